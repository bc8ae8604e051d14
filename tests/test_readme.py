"""The README is a program: its code blocks run, its commands are the ones CI uses; CONTRIBUTING.md's code map is complete."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
README, CONTRIBUTING = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md"))
INSTALL = "pip install -e '.[dev]'"


def blocks(language: str, page: str = README) -> list[str]:
    """The fenced blocks of a language, in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def commands() -> list[str]:
    """The lines of the shell block that shows the command line."""
    return [line for block in blocks("sh") if INSTALL not in block for line in block.splitlines() if line.strip()]


def test_the_python_blocks_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, _, second = blocks("python")
    names: dict = {}
    exec(compile(first, "README.md", "exec"), names)
    assert names["losses"][-1] < names["losses"][0] / 2
    assert names["logits"].shape == (4, 10)
    assert names["result"].count == 4
    trained = names["step"]
    names["model"].eval()
    np.testing.assert_allclose(trained.predict(names["x"]), names["model"](names["x"]).detach().numpy(), rtol=1e-3, atol=1e-4)
    exec(compile(second, "README.md", "exec"), names)
    assert names["partial"][-1] < names["partial"][0]
    assert names["tt"].UpdatePlan.from_toml(blocks("toml")[0]) == names["plan"]
    summary = names["small"].summary(against=names["graph"])
    assert summary.backward_flops < 0.5 * summary.against.backward_flops


def test_the_shell_block_runs(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(blocks("python")[1])
    random = np.random.default_rng(0)
    for name in ("train", "test"):
        images = random.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", x=images, y=random.integers(0, 10, 9))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    assert len(commands()) == 8
    for command in commands():
        if command.startswith("tvmtrain bench"):  # as it is, it takes minutes of a machine that does nothing else
            command = command.partition("#")[0] + "--anyway --peers eager --rounds 1 --steps 2"
        if command.startswith("tvmtrain tune"):
            command = command.partition("#")[0] + "--trials 3"
        done = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env={**os.environ, "PATH": path, "TVMTRAIN_RECORDS": str(tmp_path / "records")},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "now.safetensors").is_file()


def test_ci_uses_the_readmes_commands() -> None:
    assert f"{INSTALL} && tvmtrain quickstart" in README
    assert f"{INSTALL} && pytest" in README.splitlines()
    assert "grep -m1 -x \"pip install -e '\\.\\[dev\\]' && pytest\" README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_code_map_names_what_there_is() -> None:
    code_map = next(block for block in blocks("", CONTRIBUTING) if block.startswith("tvmtrain/errors.py"))
    named = {line.split()[0].rstrip("/") for line in code_map.splitlines()}
    private = {"__init__.py", "__main__.py", "__pycache__", "passes", "schedules", "targets", "py.typed"}
    there = {f"tvmtrain/{path.name}" for path in (ROOT / "tvmtrain").iterdir() if path.name not in private}
    assert there | {"passes", "schedules", "targets", "benchmarks", "tests"} == named
