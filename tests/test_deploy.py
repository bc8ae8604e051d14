"""Bundles for boards: what lies in one, that equal inputs make equal bytes, and what is refused before anything is written."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import tarfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy
from builds import COMPILER, EMULATOR, aarch64_wheels, need
from safetensors import numpy as tensor_file
from test_artifact import Code
from test_toolchain import graph

import tvmtrain as tt
from tvmtrain import artifact, cli, data, deploy, targets, toolchain, wheels
from tvmtrain.artifact import Artifact
from tvmtrain.errors import ArtifactError, DeviceError, InputError
from tvmtrain.wheels import Package

TVM = "0.27.0.post1"
FFI = metadata.version("apache-tvm-ffi")
PI, NANO, ORIN = (targets.load(name) for name in ("raspberry-pi-4b", "jetson-nano", "jetson-orin-nano"))


def native_file(arch: str = "aarch64", needed: Sequence[str] = (), versions: Sequence[str] = ()) -> bytes:
    """The least ELF file: a head, the libraries it needs, and the versions of their symbols."""
    strings = b"\0" + b"\0".join(s.encode() for s in (*needed, *versions)) + b"\0"
    places = {name: strings.index(b"\0" + name.encode() + b"\0") + 1 for name in (*needed, *versions)}
    dynamic = b"".join((1).to_bytes(8, "little") + places[name].to_bytes(8, "little") for name in needed) + bytes(16)
    links = [
        places[v].to_bytes(4, "little") + (16 * (i + 1 < len(versions))).to_bytes(4, "little") for i, v in enumerate(versions)
    ]
    need = (1).to_bytes(2, "little") + len(versions).to_bytes(2, "little") + bytes(4) + (16).to_bytes(4, "little") + bytes(4)
    need += b"".join(bytes(8) + link for link in links)
    parts, sections, at = [strings, dynamic, need], [], 64
    for kind, part in zip((3, 6, 0x6FFFFFFE), parts, strict=True):
        sections.append((kind, at, len(part)))
        at += len(part)
    table = b"".join(
        bytes(4) + kind.to_bytes(4, "little") + bytes(16) + place.to_bytes(8, "little") + size.to_bytes(8, "little") + bytes(24)
        for kind, place, size in sections
        if kind != 0x6FFFFFFE or versions
    )
    machine = {"aarch64": 183, "x86_64": 62}[arch]
    count = len(table) // 64
    head = b"\x7fELF\x02\x01\x01" + bytes(9) + (3).to_bytes(2, "little") + machine.to_bytes(2, "little") + bytes(20)
    head += at.to_bytes(8, "little") + bytes(10) + (64).to_bytes(2, "little") + count.to_bytes(2, "little") + bytes(2)
    return head + b"".join(parts) + table


def wheel(
    folder: Path, package: str, version: str, files: Mapping[str, bytes], arch: str = "aarch64", record: str | None = None
) -> Path:
    name = package.replace("-", "_")
    info = f"{name}-{version}.dist-info"
    files = {**files, f"{info}/licenses/LICENSE": b"free"}
    path = folder / f"{name}-{version}-py3-none-manylinux_2_28_{arch}.whl"
    rows = [
        f"{file},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip('=')},{len(data)}"
        for file, data in files.items()
    ]
    with zipfile.ZipFile(path, "w") as archive:
        for file, data in files.items():
            archive.writestr(file, data)
        archive.writestr(f"{info}/RECORD", "\n".join(rows) if record is None else record)
    return path


@pytest.fixture
def given(tmp_path: Path) -> list[Path]:
    """Wheels with the libraries' names, and what they ask for in the real ones."""
    old = ["GLIBC_2.17", "GLIBC_2.27", "GLIBCXX_3.4.22"]
    tvm = {f"tvm/lib/lib{name}.so": native_file(versions=old) for name in ("tvm_runtime", "tvm_runtime_extra")}
    tvm["tvm/lib/libtvm_runtime_cuda.so"] = native_file(needed=["libcudart.so.13", "libcuda.so.1"], versions=old)
    tvm["tvm/lib/libtvm_compiler.so"] = b"large"
    ffi = {"tvm_ffi/lib/libtvm_ffi.so": native_file(versions=old)}
    return [wheel(tmp_path, "apache-tvm", TVM, tvm), wheel(tmp_path, "apache-tvm-ffi", FFI, ffi)]


Program = Callable[[Sequence[str]], bytes]


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """The compilers that programs were made with; what the second one, Zig, makes runs with an older glibc."""
    used: list[Sequence[str]] = []

    def build(into: Path, libraries: Path, cxx: Sequence[str]) -> None:
        assert {path.name for path in libraries.iterdir()} == {"libtvm_runtime.so", "libtvm_ffi.so"}
        (into / "bin").mkdir()
        for name in ("tvmtrain-run", "tvmtrain-serve"):
            (into / "bin" / name).write_bytes(native_file(versions=["GLIBC_2.34" if cxx == ("gcc",) else "GLIBC_2.27"]))
        used.append(cxx)

    found = [
        toolchain.Toolchain(name, "aarch64-linux-gnu", (name,), (name,), glibc)
        for name, glibc in (("gcc", "2.36"), ("zig", "2.27"))
    ]
    monkeypatch.setattr(deploy, "native", SimpleNamespace(build=build))
    monkeypatch.setattr(toolchain, "installed", lambda _: iter(found))
    return used


def compiled(folder: Path, device: targets.Device, library: bytes | None = None, **versions: str) -> Path:
    """An artifact for ``device``."""
    code = Code(native_file(versions=["GLIBC_2.27"]) if library is None else library)
    versions = {"tvm": TVM, "tvmtrain": "0.1.0", **versions}
    manifest = replace(toy.manifest(), device=device.to_dict(), features=("asimd", "fp"), versions=versions)
    return Artifact(manifest, toy.state(), code).save(folder / "out")


def unpacked(bundle: Path) -> dict[str, bytes]:
    with tarfile.open(bundle) as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive if archive.extractfile(entry)}  # type: ignore[union-attr]


def test_a_bundle_has_all_that_a_board_needs_and_nothing_else(tmp_path: Path, given: list[Path], programs: list) -> None:
    folder = compiled(tmp_path, PI)
    bundle = deploy.deploy(folder, PI, tmp_path / "pi.tar.gz", given)
    files = unpacked(tmp_path / "pi.tar.gz")
    root = "tvmtrain-raspberry-pi-4b"
    own = {"README.md", "train.sh", "bin/tvmtrain-run", "bin/tvmtrain-serve", "lib/libtvm_runtime.so", "lib/libtvm_ffi.so"}
    own |= {"licenses/tvm-LICENSE", "licenses/tvm-ffi-LICENSE", *(f"artifact/{path.name}" for path in folder.iterdir())}
    assert set(files) == {f"{root}/{name}" for name in own} == {f"{root}/{name}" for name in bundle.files}
    assert files[f"{root}/artifact/lib.so"] == (folder / "lib.so").read_bytes()
    assert (bundle.unpacked, bundle.packed) == (sum(map(len, files.values())), (tmp_path / "pi.tar.gz").stat().st_size)
    assert bundle.glibc == "2.34"
    assert bundle.notes == ()
    with tarfile.open(tmp_path / "pi.tar.gz") as archive:
        entries = archive.getmembers()
    assert {e.name for e in entries if e.mode & 0o111} == {
        *(f"{root}/{name}" for name in ("train.sh", "bin/tvmtrain-run", "bin/tvmtrain-serve"))
    }
    assert {(e.mtime, e.uid, e.gid, e.uname) for e in entries} == {(0, 0, 0, "")}


def test_samples_go_along(tmp_path: Path, given: list[Path], programs: list, capsys: pytest.CaptureFixture[str]) -> None:
    folder, generator = compiled(tmp_path, PI), np.random.default_rng(0)
    x, y = generator.standard_normal((9, toy.FEATURES)), generator.integers(0, toy.CLASSES, 9)
    np.savez(tmp_path / "train.npz", x=x, y=y), np.savez(tmp_path / "test.npz", x=x[:3], y=y[:3])
    words = ["deploy", str(folder), "--device", PI.name, "-o", str(tmp_path / "pi.tar.gz"), "--mean", "0.5", "--limit", "4"]
    words += [word for path in given for word in ("--wheel", str(path))]
    assert cli.main([*words, "--data", str(tmp_path / "train.npz"), "--eval-data", str(tmp_path / "test.npz")]) == 0
    files = unpacked(tmp_path / "pi.tar.gz")
    found = {name: tensor_file.load(files[f"tvmtrain-raspberry-pi-4b/{name}.safetensors"]) for name in ("train", "test")}
    np.testing.assert_array_equal(found["train"]["x"], (x[[0, 2, 4, 6]].astype("float32") - np.float32(0.5)))
    np.testing.assert_array_equal(found["train"]["y"], y[[0, 2, 4, 6]])
    assert len(found["test"]["y"]) == 3
    with pytest.raises(SystemExit):
        cli.main([*words, "--eval-data", str(tmp_path / "test.npz")])
    assert "--eval-data: needs --data" in capsys.readouterr().err


def test_samples_that_a_board_would_refuse_are_refused_here(
    tmp_path: Path, given: list[Path], programs: list, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = compiled(tmp_path, PI)
    words = ["deploy", str(folder), "--device", PI.name, "-o", str(tmp_path / "pi.tar.gz"), "--data", str(tmp_path / "d.npz")]
    words += [word for path in given for word in ("--wheel", str(path))]
    x, y = np.zeros((7, toy.FEATURES)), np.array([0, 1, 2, 0, 1, toy.CLASSES, 0])
    np.savez(tmp_path / "d.npz", x=x, y=y)
    assert cli.main(words) == 1
    assert f"d.npz: target 'y' has the label {toy.CLASSES} in sample 5 " in capsys.readouterr().err
    assert not (tmp_path / "pi.tar.gz").exists()
    np.savez(tmp_path / "d.npz", x=x[:3], y=y[:3])
    assert cli.main(words) == 0
    assert "note: 3 samples are too few to train on: a batch is 4" in capsys.readouterr().out
    np.savez(tmp_path / "d.npz", x=x, y=y % toy.CLASSES)
    assert cli.main(words) == 0
    messages = capsys.readouterr().out
    assert "3 of 7 samples are left out of every epoch: training needs whole batches of 4" in messages
    assert f"next: scp {tmp_path}/pi.tar.gz BOARD: and, there,\n  tar xzf pi.tar.gz && cd tvmtrain-{PI.name}\n" in messages
    assert "  ./train.sh --data train.safetensors --epochs 3" in messages


def test_an_unpacked_artifact_is_the_artifact(tmp_path: Path, given: list[Path], programs: list) -> None:
    deploy.deploy(compiled(tmp_path, PI), PI, tmp_path / "pi.tar.gz", given)
    with tarfile.open(tmp_path / "pi.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    assert artifact.read(tmp_path / "tvmtrain-raspberry-pi-4b" / "artifact", foreign=True).manifest.device["name"] == PI.name


def test_equal_inputs_make_equal_bytes(tmp_path: Path, given: list[Path], programs: list) -> None:
    folder = compiled(tmp_path, PI)
    first = deploy.deploy(folder, PI, tmp_path / "a.tar.gz", given)
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    assert deploy.deploy(folder, PI, tmp_path / "b.tar.gz", given).files == first.files
    assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "b.tar.gz").read_bytes()


def test_the_readme_tells_of_this_artifact(tmp_path: Path, given: list[Path], programs: list) -> None:
    deploy.deploy(compiled(tmp_path, PI), PI, tmp_path / "pi.tar.gz", given)
    text = unpacked(tmp_path / "pi.tar.gz")["tvmtrain-raspberry-pi-4b/README.md"].decode()
    assert "| `x` | input | [4, 6] | float32 |" in text
    assert "| `y` | target | [4] | int64 |" in text
    assert "glibc 2.36 or newer, and a processor with: asimd, fp" in text
    assert "CUDA" not in text
    assert "Nothing has to be installed here" in text
    assert "$" not in text


def test_a_name_that_a_killed_save_left_is_no_trouble(tmp_path: Path, given: list[Path], programs: list) -> None:
    folder = compiled(tmp_path, PI)
    (folder / "lib.so").rename(folder / ".new-lib.so")
    deploy.deploy(folder, PI, tmp_path / "pi.tar.gz", given)
    assert "tvmtrain-raspberry-pi-4b/artifact/lib.so" in unpacked(tmp_path / "pi.tar.gz")


# What a board's system lacks.


def test_programs_for_an_older_system_are_made_by_another_compiler(tmp_path: Path, given: list[Path], programs: list) -> None:
    board = targets.load("jetson-xavier-nx-cpu")
    assert deploy.deploy(compiled(tmp_path, board), board, tmp_path / "a.tar.gz", given).glibc == "2.27"
    assert programs == [("gcc",), ("zig",)]


def test_where_there_is_no_other_compiler_nothing_is_written(
    tmp_path: Path, given: list[Path], programs: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = list(toolchain.installed(PI))[:1]
    monkeypatch.setattr(toolchain, "installed", lambda _: iter(found))
    board = targets.load("jetson-xavier-nx-cpu")
    (tmp_path / "a.tar.gz").write_bytes(b"before")
    with pytest.raises(DeviceError, match=r"glibc 2\.31.*gcc \(glibc 2\.36\).*pip install ziglang"):
        deploy.deploy(compiled(tmp_path, board), board, tmp_path / "a.tar.gz", given)
    assert (tmp_path / "a.tar.gz").read_bytes() == b"before"


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (native_file("x86_64"), r"artifact/lib\.so is for x86_64, and raspberry-pi-4b is aarch64"),
        (native_file(versions=["GLIBC_2.41"]), r"artifact/lib\.so asks for glibc 2\.41.*has glibc 2\.36"),
        (native_file(versions=["GLIBCXX_3.4.33"]), r"lib\.so asks for GLIBCXX 3\.4\.33"),
    ],
)
def test_code_that_would_not_be_loaded_is_refused(
    tmp_path: Path, given: list[Path], programs: list, library: bytes, message: str
) -> None:
    with pytest.raises(DeviceError, match=message):
        deploy.deploy(compiled(tmp_path, PI, library), PI, tmp_path / "a.tar.gz", given)
    assert not (tmp_path / "a.tar.gz").exists()


def test_an_older_cuda_than_the_packages_is_said_with_the_recipe(tmp_path: Path, given: list[Path], programs: list) -> None:
    bundle = deploy.deploy(compiled(tmp_path, ORIN, cuda="13.0"), ORIN, tmp_path / "a.tar.gz", given)
    (library, code) = bundle.notes
    assert "libtvm_runtime_cuda.so for CUDA 13, and JetPack 6.2 (Ubuntu 22.04) has CUDA 12.6" in library
    assert "made by CUDA 13.0" in code
    assert "nvidia-cuda-nvrtc-cu12" in code
    assert "lib/libtvm_runtime_cuda.so" not in bundle.files
    text = unpacked(tmp_path / "a.tar.gz")["tvmtrain-jetson-orin-nano/README.md"].decode()
    assert library in text
    assert "Nothing has to be installed" not in text
    assert "one thing before the first start: the GPU's library" in text
    assert "a bundle for `jetson-orin-nano-cpu` needs nothing" in text
    assert f"--branch v{TVM} https://github.com/apache/tvm" in text
    assert "--target tvm_runtime tvm_runtime_cuda" in text


def test_a_board_with_the_packages_cuda_gets_its_library(tmp_path: Path, given: list[Path], programs: list) -> None:
    board = replace(ORIN, cuda_toolkit="13.2")
    bundle = deploy.deploy(compiled(tmp_path, board, cuda="13.0"), board, tmp_path / "a.tar.gz", given)
    assert bundle.notes == ()
    assert "lib/libtvm_runtime_cuda.so" in bundle.files


# What is refused.


def test_an_artifact_of_another_device_is_refused(tmp_path: Path, given: list[Path], programs: list) -> None:
    folder = compiled(tmp_path, targets.load("x86-64-v3"))
    with pytest.raises(
        DeviceError, match=r"compiled for 'x86-64-v3' \(x86_64\), not for 'raspberry-pi-4b'.*--device raspberry-pi-4b"
    ):
        deploy.deploy(folder, PI, tmp_path / "a.tar.gz", given)
    folder, board = compiled(tmp_path / "pi", PI), replace(PI, target={**PI.target, "mcpu": "cortex-a53"})
    with pytest.raises(DeviceError, match=r"its target was .*cortex-a72.*cortex-a53.*compile it again"):
        deploy.deploy(folder, board, tmp_path / "a.tar.gz", given)
    assert programs == []


def test_other_names_and_damaged_artifacts_are_refused(tmp_path: Path, given: list[Path], programs: list) -> None:
    folder = compiled(tmp_path, PI)
    with pytest.raises(InputError, match=r"a\.zip.*\.tar\.gz"):
        deploy.deploy(folder, PI, tmp_path / "a.zip", given)
    (folder / "lib.so").write_bytes(b"changed")
    with pytest.raises(ArtifactError, match=r"lib\.so"):
        deploy.deploy(folder, PI, tmp_path / "a.tar.gz", given)


# Wheels.


def test_a_wheel_is_known_by_its_name() -> None:
    package = Package("apache-tvm", TVM)
    name = "apache_tvm-{}-py3-none-manylinux_2_27_{}.manylinux_2_28_{}.{}"
    assert package.is_wheel(Path(name.format(TVM, "aarch64", "aarch64", "whl")), "aarch64")
    for version, arch, suffix in (("0.26", "aarch64", "whl"), (TVM, "x86_64", "whl"), (TVM, "aarch64", "zip")):
        assert not package.is_wheel(Path(name.format(version, arch, arch, suffix)), "aarch64")
    assert not package.is_wheel(Path(f"apache_tvm_ffi-{TVM}-py3-none-manylinux_2_28_aarch64.whl"), "aarch64")
    assert not package.is_wheel(Path(f"apache_tvm-{TVM}-py3-none-musllinux_1_2_aarch64.whl"), "aarch64")


def test_a_given_wheel_that_does_not_fit_is_named() -> None:
    packages = (Package("apache-tvm", TVM), Package("apache-tvm-ffi", FFI))
    good = Path(f"apache_tvm-{TVM}-py3-none-manylinux_2_28_aarch64.whl")
    wheels.check(packages, "aarch64", [good])
    with pytest.raises(
        DeviceError, match=r"apache_tvm-0\.26-.*: want a wheel of apache-tvm .* or apache-tvm-ffi .* on aarch64"
    ):
        wheels.check(packages, "aarch64", [good, Path("apache_tvm-0.26-py3-none-manylinux_2_28_aarch64.whl")])


def test_files_fit_the_record(tmp_path: Path) -> None:
    path = wheel(tmp_path, "apache-tvm", TVM, {"a": b"content"})
    assert wheels.files(path, ["a"]) == {"a": b"content"}
    assert wheels.licenses(path) == {"LICENSE": b"free"}
    with pytest.raises(DeviceError, match=r"whl.*'b'.*download it again"):
        wheels.files(path, ["b"])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("a,sha256=AAAA,7", "a does not fit its sha256"),
        ("a,sha256=AAAA,9", "a has 7 bytes, and RECORD says 9"),
        ("a,,", "'a'"),
        ("a,sha256=AAAA,x", "invalid literal"),
    ],
)
def test_damaged_wheels_are_refused(tmp_path: Path, record: str, message: str) -> None:
    path = wheel(tmp_path, "apache-tvm", TVM, {"a": b"content"}, record=record)
    with pytest.raises(DeviceError, match=message):
        wheels.files(path, ["a"])


def test_what_is_no_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"no archive")
    with pytest.raises(DeviceError, match=r"a\.whl.*download it again"):
        wheels.files(tmp_path / "a.whl", ["a"])


def test_a_wheel_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = wheel(tmp_path, "apache-tvm", TVM, {"a": b"content"})
    commands: list[list[str]] = []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        shutil.copy(made, command[command.index("-d") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    package, cache = Package("apache-tvm", TVM), tmp_path / "cache"
    first = wheels.find(package, "aarch64", [], cache)
    assert wheels.find(package, "aarch64", [], cache) == first == cache / made.name
    (command,) = commands
    assert command[-1] == f"apache-tvm=={TVM}"
    assert command[command.index("--platform") + 1] == "manylinux_2_28_aarch64"
    assert list(cache.iterdir()) == [first]


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: slow\nERROR: No matching distribution found\n")
    monkeypatch.setattr(wheels.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(DeviceError, match="No matching distribution found; give its wheel with --wheel"):
        wheels.find(Package("apache-tvm", TVM), "aarch64", [], tmp_path)
    assert list(tmp_path.iterdir()) == []


# The command.


def test_the_command(tmp_path: Path, given: list[Path], programs: list, capsys: pytest.CaptureFixture[str]) -> None:
    folder = compiled(tmp_path, PI)
    options = [word for path in given for word in ("--wheel", str(path))]
    command = ["deploy", str(folder), "--device", PI.name, "-o", str(tmp_path / "pi.tar.gz"), *options]
    assert cli.main([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["packed"] == (tmp_path / "pi.tar.gz").stat().st_size
    assert result["device"] == PI.name
    assert cli.main(["deploy", str(folder), "--device", "raspberry-pi-5", "-o", str(tmp_path / "a.tar.gz")]) == 1
    assert "compile it with --device raspberry-pi-5" in capsys.readouterr().err


# The whole of it.


@pytest.fixture
def unpacked_bundle(tmp_path: Path) -> Path:
    """Cross-compiled, with its data, packed, and unpacked in an empty folder."""
    need("cmake", COMPILER, EMULATOR[0])
    found = aarch64_wheels()
    torch.manual_seed(0)
    folder = tt.build(graph(), PI).save(tmp_path / "out")
    generator = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=generator.standard_normal((8, 3, 16, 16)).astype("float32"), y=generator.integers(0, 10, 8))
    samples = data.load(tmp_path / "d.npz", artifact.read(folder, foreign=True).manifest)
    bundle = deploy.deploy(folder, PI, tmp_path / "pi.tar.gz", list(found.values()), samples)
    assert bundle.packed < 6e6
    assert bundle.unpacked < 10e6
    with tarfile.open(tmp_path / "pi.tar.gz") as archive:
        archive.extractall(tmp_path / "board", filter="data")
    return tmp_path / "board" / "tvmtrain-raspberry-pi-4b"


@pytest.mark.slow
def test_a_bundle_trains_where_there_is_nothing_else(unpacked_bundle: Path, tmp_path: Path) -> None:
    """By an emulated Cortex-A72 and the real runner; killed twenty times, it goes on from a whole checkpoint every time."""
    words = [str(shutil.which(EMULATOR[0])), *EMULATOR[1:], "bin/tvmtrain-run", "artifact", "--data", "train.safetensors"]
    words += ["--checkpoint", "now.safetensors", "--resume", "--every", "1", "--log", "1000000"]
    how = {"cwd": unpacked_bundle, "env": {"QEMU_CPU": "cortex-a72"}, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    done = subprocess.run([*words, "--epochs", "5"], **how, check=False)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    here = tt.build(graph(), "host").load()
    there = data.load(tmp_path / "d.npz", here.manifest).train
    for _ in range(5):
        for i in range(0, 8, 2):
            here(*there.batch(range(i, i + 2)))
    state, steps = artifact.read_checkpoint(unpacked_bundle / "now.safetensors", here.manifest.state)
    assert steps == 20
    for name, value in here.state_dict().items():
        np.testing.assert_allclose(state[name], value, rtol=1e-4, atol=1e-4)

    chance, seen = random.Random(0), [steps]
    for _ in range(20):
        process = subprocess.Popen([*words, "--epochs", "1000000"], **how)
        time.sleep(chance.uniform(0.1, 1.0))
        process.kill()
        assert process.communicate()[1] == b""
        seen.append(artifact.read_checkpoint(unpacked_bundle / "now.safetensors", here.manifest.state)[1])
    assert seen == sorted(seen)
    assert len(set(seen)) > 5


def test_packing_is_what_tar_reads(tmp_path: Path) -> None:
    data = deploy.pack({"b": b"2", "bin/a": b"1"}, "root")
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(data))) as archive:
        assert [(e.name, oct(e.mode)) for e in archive] == [("root/b", "0o644"), ("root/bin/a", "0o755")]
