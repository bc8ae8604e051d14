"""Code for other processors: what links it, what is said where nothing does, what it asks of a board, what a board refuses."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import models
import pytest
import torch
import toy
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda import compiler_for
from torch import nn
from tvm.ir.instrument import PassTimingInstrument
from tvm.ir.transform import PassContext
from tvm.target import Target
from tvm.target import codegen as llvm

import tvmtrain as tt
from tvmtrain import artifact, builder, codegen, cuda_compiler, elf, features, lowering, registers, targets, toolchain
from tvmtrain.errors import ArtifactError, DeviceError
from tvmtrain.uncollected import uncollected

ROOT = Path(__file__).resolve().parents[1]
TRIPLE = "aarch64-linux-gnu"
CROSS = shutil.which(f"{TRIPLE}-g++")
HEADER = Path(f"/usr/{TRIPLE}/include/asm/hwcap.h")
PI = targets.load("raspberry-pi-4b")
needs_cross = pytest.mark.skipif(CROSS is None, reason=f"{TRIPLE}-g++ is not installed (Debian: g++-{TRIPLE})")
needs_emulator = pytest.mark.skipif(
    shutil.which("qemu-aarch64-static") is None, reason="Debian's qemu-user-static is not installed"
)


def graph(width: int = 8) -> tt.TrainGraph:
    first = (nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6())
    model = nn.Sequential(*first, nn.Conv2d(width, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    return tt.trace(model, torch.randn(2, 3, 16, 16), torch.tensor([0, 1]), optimizer=tt.SGD(lr=0.1, momentum=0.9))


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.shutil, "which", lambda *_: None)
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda _: None)
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)


# What is found.


def test_what_to_install_is_said_before_anything_is_compiled(nothing_installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "packed", lambda *_: pytest.fail("compiles"))
    with pytest.raises(DeviceError, match=r"aarch64-linux-gnu.*apt-get install g\+\+-aarch64-linux-gnu.*pip install ziglang"):
        tt.build(graph(), "raspberry-pi-4b")


def test_this_machine_needs_no_linker_to_run_code_in_memory(nothing_installed: None) -> None:
    assert codegen.tools(targets.load("host")) is None


def test_debians_name_of_a_package_has_no_underscore() -> None:
    board = replace(PI, target={"kind": "llvm", "mtriple": "riscv64_x-linux-gnu"}, arch="riscv64")
    assert "apt-get install g++-riscv64-x-linux-gnu" in toolchain.missing(board)


def test_variables_name_this_machines_compilers(nothing_installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "ccache /opt/g++-12 -m64 '-DA=\"g++ b\"'")
    found = toolchain.find(targets.load("host"))
    assert found.cxx == ("ccache", "/opt/g++-12", "-m64", '-DA="g++ b"')
    assert found.c == ("ccache", "/opt/gcc-12", "-m64", '-DA="g++ b"')
    monkeypatch.setenv("CC", "clang -m64")
    assert toolchain.find(targets.load("host")).c == ("clang", "-m64")
    monkeypatch.delenv("CXX")
    with pytest.raises(DeviceError, match="nothing here links"):  # a C compiler links no C++
        toolchain.find(targets.load("host"))


def test_zig_makes_code_for_the_glibc_of_the_board(nothing_installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: name == "ziglang" or None)
    found = toolchain.find(targets.load("jetson-nano-cpu"))
    assert found.cxx == (sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu.2.27")
    assert toolchain.find(replace(PI, glibc="")).glibc == toolchain.OLD_GLIBC


@needs_cross
def test_programs_for_an_older_system_need_another_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda _: None)
    glibc = toolchain.find(PI).glibc
    assert re.fullmatch(r"2\.\d+", glibc)
    assert toolchain.find(PI, glibc=glibc).name == f"{TRIPLE}-g++"
    with pytest.raises(DeviceError, match=rf"glibc 2.17.*{TRIPLE}-g\+\+ \(glibc {glibc}\).*pip install ziglang"):
        toolchain.find(PI, glibc="2.17")


# What is made.


@needs_cross
def test_a_step_for_a_board_asks_for_an_old_glibc_and_libm_alone(tmp_path: Path) -> None:
    tt.build(graph(), "raspberry-pi-4b").save(tmp_path)
    found = elf.read((tmp_path / "lib.so").read_bytes(), "lib.so")
    assert found.arch == "aarch64"
    assert set(found.needed) <= {"libm.so.6", "libc.so.6"}
    assert toolchain.version(found.glibc) <= (2, 27)
    manifest = artifact.read(tmp_path, foreign=True).manifest
    assert manifest.features == ("asimd", "fp")
    assert targets.Device.from_dict(manifest.device) == PI
    with pytest.raises(ArtifactError, match=r"compiled for aarch64 \(device 'raspberry-pi-4b'\) and this machine is"):
        tt.load(tmp_path)


@needs_cross
def test_many_kernels_are_compiled_in_parts_for_a_board_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[str] = []
    compile_part = codegen._object
    monkeypatch.setattr(codegen, "FEW", 1)
    monkeypatch.setattr(codegen, "_object", lambda part, target, path: parts.append(path) or compile_part(part, target, path))
    tt.build(graph(), "raspberry-pi-4b").save(tmp_path)
    assert len(parts) == codegen.PARTS
    assert elf.read((tmp_path / "lib.so").read_bytes(), "lib.so").arch == "aarch64"


@pytest.mark.slow  # its first link compiles what it links with
@pytest.mark.skipif(toolchain.importlib.util.find_spec("ziglang") is None, reason="ziglang is not installed (PyPI)")
def test_zig_links_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.shutil, "which", lambda *_: None)
    tt.build(graph(), "raspberry-pi-4b").save(tmp_path)
    assert elf.read((tmp_path / "lib.so").read_bytes(), "lib.so").arch == "aarch64"


@needs_cross
@pytest.mark.parametrize(
    "name",
    ["jetson-orin-nano", *(pytest.param(name, marks=pytest.mark.slow) for name in ("jetson-nano", "jetson-xavier-nx"))],
)
def test_a_step_for_a_jetson_has_an_arm_host(tmp_path: Path, name: str) -> None:
    compiler_for(str(targets.load(name).gpu))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of the CUDA that is installed here
        tt.build(graph(), name).save(tmp_path)
    found = elf.read((tmp_path / "lib.so").read_bytes(), "lib.so")
    assert (found.arch, set(found.needed) - {"libc.so.6", "libm.so.6"}) == ("aarch64", set())
    assert "asimd" in artifact.read(tmp_path, foreign=True).manifest.features


def test_a_compiler_that_suits_the_boards_driver_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [cuda_compiler.Compiler(name, version, lambda *_: b"") for name, version in (("nvcc", "13.0"), ("nvrtc", "12.9"))]
    monkeypatch.setattr(cuda_compiler, "_candidates", lambda _: iter(found))
    chosen = {toolkit: cuda_compiler.find("sm_87", toolkit).version for toolkit in ("", "13.2", "12.6", "11.4")}
    assert chosen == {"": "13.0", "13.2": "13.0", "12.6": "12.9", "11.4": "13.0"}
    assert cuda_compiler.refusal("12.9", "12.6") == ""
    assert "pip install nvidia-cuda-nvrtc-cu11" in cuda_compiler.refusal("12.9", "11.4")
    assert "build for its processor" in cuda_compiler.refusal("12.9", "10.2")


@needs_cross
@pytest.mark.slow
@pytest.mark.parametrize("name", ["raspberry-pi-4b", "jetson-nano", "jetson-xavier-nx", "jetson-orin-nano"])
def test_a_whole_network_is_linked(tmp_path: Path, name: str) -> None:
    if gpu := targets.load(name).gpu:
        compiler_for(gpu)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        tt.build(tt.trace(*models.build(models.EXAMPLES["mobilenet_v2"], training=True)), name).save(tmp_path)
    assert toolchain.version(elf.read((tmp_path / "lib.so").read_bytes(), "lib.so").glibc) <= (2, 27)


# What code needs of a processor.


def needs(mcpu: str) -> set[str]:
    target = Target({"kind": "llvm", "mtriple": TRIPLE, "mcpu": mcpu})
    return set(features.needed("aarch64", llvm.llvm_get_cpu_features(target)))


# What Linux shows in /proc/cpuinfo of these boards, as far as loops are concerned.
SHOWN = {
    "cortex-a53": {"fp", "asimd"},
    "cortex-a57": {"fp", "asimd"},
    "cortex-a72": {"fp", "asimd"},
    "cortex-a76": {"fp", "asimd", "atomics", "fphp", "asimdhp", "asimdrdm", "lrcpc", "asimddp"},
    "carmel": {"fp", "asimd", "atomics", "fphp", "asimdhp", "asimdrdm"},
    "cortex-a78ae": {"fp", "asimd", "atomics", "fphp", "asimdhp", "asimdrdm", "lrcpc", "asimddp"},
}


@pytest.mark.parametrize("mcpu", SHOWN)
def test_a_board_has_what_its_code_needs(mcpu: str) -> None:
    assert needs(mcpu) == SHOWN[mcpu]


def test_code_for_a_newer_core_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """SVE would be an illegal instruction on a Cortex-A72."""
    made = replace(toy.manifest(), device={"name": "server", "arch": "aarch64"}, features=tuple(sorted(needs("neoverse-v1"))))
    monkeypatch.setattr(features, "offered", lambda: frozenset(SHOWN["cortex-a72"]))
    monkeypatch.setattr(artifact, "machine", lambda: "aarch64")
    with pytest.raises(
        ArtifactError, match=r"newer processor \(device 'server'\): this machine, aarch64, lacks .*sve.*build it"
    ):
        artifact.check_machine(made)
    artifact.check_machine(replace(made, features=tuple(sorted(needs("cortex-a53")))))


def test_what_this_machine_compiles_for_itself_it_can_run() -> None:
    offered = features.offered()
    assert offered is not None
    assert set(codegen.features(targets.load("host"))) <= offered


@pytest.mark.parametrize("facts", ["sve", [1], {"sve": True}])
def test_needs_of_another_kind_are_refused(facts: object) -> None:
    with pytest.raises(ArtifactError, match="'features'"):
        artifact.Manifest.from_dict(json.loads(json.dumps(toy.manifest().to_dict() | {"features": facts})))


@pytest.mark.skipif(not HEADER.exists(), reason=f"{HEADER} is not installed (Debian: linux-libc-dev-arm64-cross)")
def test_bits_are_linuxs() -> None:
    found = re.findall(r"#define HWCAP(2?)_(\w+)\s+\(1(?:UL)? << (\d+)\)", HEADER.read_text())
    bits = {(features.HWCAP2 if second else features.HWCAP, name.lower()): int(bit) for second, name, bit in found}
    assert {(f.word, f.name): f.bit for f in features.AARCH64}.items() <= bits.items()


def test_the_runner_has_the_same_bits() -> None:
    text = (ROOT / "tvmtrain" / "native" / "src" / "machine.cc").read_text()
    rows = [(name, int(word), int(bit)) for name, word, bit in re.findall(r'\{"(\w+)", (\d+), (\d+)\}', text)]
    assert rows == [(f.name, f.word, f.bit) for f in features.AARCH64]


@needs_cross
@needs_emulator
@pytest.mark.parametrize("mcpu", ["cortex-a53", "cortex-a72", "cortex-a76"])
def test_an_emulated_core_shows_what_its_code_needs(tmp_path: Path, mcpu: str) -> None:
    program = 'int main() { printf("%lu %lu", getauxval(16), getauxval(26)); }'
    (tmp_path / "show.c").write_text(f"#include <stdio.h>\n#include <sys/auxv.h>\n{program}")
    subprocess.run([*toolchain.find(PI).c, "show.c", "-o", "show", "-static"], cwd=tmp_path, check=True)
    command = ["qemu-aarch64-static", "./show"]
    shown = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "QEMU_CPU": mcpu}, capture_output=True, text=True, check=True
    )
    words = dict(zip((features.HWCAP, features.HWCAP2), map(int, shown.stdout.split()), strict=True))
    assert needs(mcpu) == {f.name for f in features.AARCH64 if words[f.word] >> f.bit & 1}


# What a native file asks for.


@needs_cross
def test_libraries_and_versions_are_what_objdump_says(tmp_path: Path) -> None:
    (tmp_path / "a.cc").write_text(
        "#include <iostream>\n#include <cmath>\nint main(int n, char**) { std::cout << std::exp(n); }"
    )
    found = toolchain.find(PI)
    subprocess.run([*found.cxx, "a.cc", "-o", "a"], cwd=tmp_path, check=True)
    told = elf.read((tmp_path / "a").read_bytes(), "a")
    dump = subprocess.run([f"{TRIPLE}-objdump", "-p", "a"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert list(told.needed) == re.findall(r"NEEDED\s+(\S+)", dump)
    assert set(told.versions) == set(re.findall(r"0x[0-9a-f]{8} 0x00 \d+ (\S+)", dump))
    assert (told.glibc, told.libstdcxx) != ("", "")


@pytest.fixture(scope="module")
def own_library(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("own")
    (folder / "a.cc").write_text('#include <cmath>\nextern "C" float f(float x) { return expf(x); }')
    own = next(toolchain.installed(targets.load("host")), None)
    if own is None:
        pytest.skip("no C++ compiler for this machine is installed")
    own.link(str(folder / "lib.so"), [str(folder / "a.cc")], ["-lm"])
    return (folder / "lib.so").read_bytes()


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_file_is_an_error_and_nothing_else(own_library: bytes, data: st.DataObject) -> None:
    damaged = bytearray(own_library)
    for _ in range(data.draw(st.integers(1, 8))):
        # The head, or the table of sections at the end.
        place = data.draw(st.integers(0, 63) | st.integers(len(damaged) - 2048, len(damaged) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    with suppress(DeviceError):
        elf.read(bytes(damaged[: data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))]), "lib.so")


def test_what_is_no_library_is_named() -> None:
    with pytest.raises(DeviceError, match=r"lib\.so is no sound native library"):
        elf.read(b"MZ" + bytes(100), "lib.so")


def test_the_passes_that_are_left_out_change_no_object_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a step with shuffled copies, guarded rows and tasks; and each is a pass that would have run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU6(), nn.Conv2d(16, 24, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    graph = tt.trace(model, torch.randn(2, 3, 17, 17), torch.tensor([1, 2]))
    device = targets.load("host")
    planned = lowering.plan(lowering.lower(graph.module(), device))
    kernels = tvm.IRModule({n.name_hint: f for n, f in planned.functions_items() if isinstance(f, tvm.tirx.PrimFunc)})
    kernels = tvm.IRModule({n.name_hint: f.with_attr("global_symbol", n.name_hint) for n, f in kernels.functions_items()})
    codes = []
    for idle in (codegen.IDLE, []):
        monkeypatch.setattr(codegen, "IDLE", idle)
        codegen.compiled(kernels, codegen.processor(device)).write_to_file(str(tmp_path / "code.o"))
        codes.append((tmp_path / "code.o").read_bytes())
    assert codes[0] == codes[1]
    timing = PassTimingInstrument()
    with PassContext(opt_level=3, config=codegen.KERNELS, instruments=[timing]):
        tvm.tirx.build(kernels, target=codegen.processor(device), pipeline=registers.PIPELINE)
        ran = timing.render()
    monkeypatch.undo()
    assert [name for name in codegen.IDLE if f"{name}:" not in ran] == []


def test_the_garbage_collector_is_as_it_was_before() -> None:
    with suppress(KeyError), uncollected():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
