"""Imports run one way; the root folders are reachable; a device needs neither PyTorch nor the compiler."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tvmtrain"

# Each room and the rooms it may import from. A package is one room.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "spec": {"errors"},
    "costs": {"errors"},
    "features": set(),
    "native": {"elf", "errors", "toolchain"},
    "artifact": {"costs", "errors", "features", "runtime"},  # the runtime only when an artifact in memory is loaded
    "targets": {"errors", "features"},
    "selection": {"artifact", "errors"},
    "gpu_code": {"errors"},
    "cuda_compiler": {"errors"},
    "toolchain": {"errors", "targets"},
    "batches": {"artifact", "errors"},
    "losses": {"artifact"},
    "checks": {"artifact", "errors"},
    "runtime": {"artifact", "batches", "checks", "errors", "gpu_code", "losses", "selection"},
    "gpu_load": set(),
    "console": set(),
    "data": {"artifact", "checks", "errors"},
    "session": {"artifact", "features", "errors", "runtime"},
    "remote": {"artifact", "errors", "features", "runtime", "session"},
    "serve": {"console", "errors", "remote", "session"},
    "training": {"artifact", "batches", "console", "data", "errors", "runtime"},
    "philox": set(),
    "operators": set(),
    "onnx_model": {"errors"},
    "signature": {"artifact"},
    "converters": {"operators", "philox", "errors"},
    "translator": {"converters", "errors"},
    "exporting": {"errors", "translator"},
    "importer": {"artifact", "converters", "errors", "exporting", "onnx_model", "signature", "spec", "translator"},
    "sizes": set(),
    "uncollected": set(),
    "arena": set(),
    "filtering": {"operators", "schedules", "sizes"},
    "autodiff": {"filtering", "operators", "signature", "sizes"},
    "passes": {"arena", "artifact", "autodiff", "errors", "filtering", "operators", "signature", "sizes", "spec"},
    "report": {"costs", "operators", "passes", "signature", "sizes"},
    "workload": {"costs", "passes", "sizes"},
    "timeline": {"arena", "costs", "passes", "signature", "sizes"},
    "drawing": {"costs", "errors"},
    "roofline": {"errors", "targets"},
    "profile": {"artifact", "console", "costs", "drawing", "errors", "roofline", "runtime"},
    "legalize_once": {"schedules"},
    "lowering": {
        *("codegen", "filtering", "kernels", "legalize_once", "norm_kernels", "passes", "pool_kernels", "schedules", "targets"),
    },
    "fitting": {"errors", "lowering", "passes", "targets"},
    "summarize": {"artifact", "costs", "lowering", "passes", "report", "signature", "targets"},
    "graph": {
        *("artifact", "autodiff", "converters", "errors", "fitting", "importer", "passes", "report", "signature", "spec"),
        *("summarize", "targets", "uncollected"),
    },
    "strided": {"schedules"},
    "kernels": {"legalize_once", "operators", "schedules", "strided", "targets"},
    "pool_kernels": {"schedules", "strided"},
    "norm_kernels": {"legalize_once", "operators", "schedules", "targets"},
    "registers": set(),
    "elf": {"errors"},
    "wheels": {"errors"},
    "codegen": {"cuda_compiler", "features", "gpu_code", "registers", "targets", "toolchain"},
    "schedules": {"artifact", "errors", "signature", "sizes", "targets"},
    "builder": {
        *("artifact", "codegen", "costs", "cuda_compiler", "graph", "lowering", "passes", "runtime", "spec", "summarize"),
        *("targets", "timeline", "uncollected", "workload"),
    },
}
# These join the rooms above for a person; they may use everything.
FRONT = {
    "tuner",
    "trials",
    "cli",
    "oracle",
    "jobs",
    "deploy",
    "describe",
    "verify",
    "quickstart",
    "bench",
    "board_bench",
    "fleet",
    "contestant",
    "peers",
    "gpu_peers",
    "__init__",
    "__main__",
}
WITH_TORCH = {
    "converters",
    "oracle",
    "exporting",
    "importer",
    "onnx_model",
    "translator",
    "jobs",
    "verify",
    "quickstart",
    "peers",
    "gpu_peers",
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def files() -> list[Path]:
    links = [path for name in ("passes", "schedules", "targets") for path in (PACKAGE / name).glob("*.py")]
    return sorted({*PACKAGE.glob("*.py"), *PACKAGE.glob("*/*.py"), *links})


def imported(path: Path) -> set[str]:
    """Full names that a file imports, anywhere in it, but for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checked = {
        id(n)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for n in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in checked:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_used(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith("tvmtrain.")} - {room(path)}


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    if room(path) not in FRONT:
        assert rooms_used(path) <= ALLOWED[room(path)]


def test_the_table_has_no_circle() -> None:
    waiting = {name: used - ({"runtime"} if name == "artifact" else set()) for name, used in ALLOWED.items()}
    while ready := {name for name, used in waiting.items() if not used & waiting.keys()}:
        waiting = {name: used for name, used in waiting.items() if name not in ready}
    assert not waiting


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_torch_stays_where_models_are_read(path: Path) -> None:
    uses = {name.split(".")[0] for name in imported(path)}
    assert "torch" not in uses or room(path) in WITH_TORCH


@pytest.mark.parametrize("name", ["passes", "schedules", "targets"])
def test_the_root_folders_are_linked(name: str) -> None:
    link = PACKAGE / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
