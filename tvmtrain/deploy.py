"""An artifact as one file for a board: code and weights, TVM's runtime, the runner, a start script and how to use them.

The board needs neither Python nor a compiler. The same input makes the same bytes.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata, resources
from pathlib import Path
from string import Template
from typing import Any

from tvmtrain import artifact, cuda_compiler, data, elf, native, targets, toolchain, wheels
from tvmtrain.artifact import Manifest
from tvmtrain.data import Data
from tvmtrain.elf import Elf
from tvmtrain.errors import DeviceError, InputError
from tvmtrain.targets import Device
from tvmtrain.wheels import Package

RUNTIME = ("tvm/lib/libtvm_runtime.so",)
GPU_RUNTIME = ("tvm/lib/libtvm_runtime_cuda.so",)
FFI = ("tvm_ffi/lib/libtvm_ffi.so",)
STARTED = ("bin/", "train.sh")
GPU_LIBRARY = "libtvm_runtime_cuda.so"


@dataclass(frozen=True)
class Bundle:
    """What was written to ``path``; sizes in bytes. ``notes`` say what the board needs besides, or what was not possible.

    ``weights``: parameters and buffers, which packing hardly makes smaller; ``unpacked`` has them too.
    """

    path: str
    device: str
    packed: int
    unpacked: int
    weights: int
    glibc: str
    files: Mapping[str, int]
    notes: tuple[str, ...]

    @property
    def root(self) -> str:
        """The folder that it unpacks into."""
        return _root(self.device)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def deploy(
    folder: str | os.PathLike[str],
    device: str | Device,
    output: str | os.PathLike[str],
    given: Sequence[Path] = (),
    samples: Data | None = None,
) -> Bundle:
    """Write the artifact in ``folder`` with all that ``device`` needs to train into ``output``, a .tar.gz file.

    ``given``: wheels of apache-tvm and apache-tvm-ffi for the device's processor; what is not given is downloaded with pip.
    ``samples`` (``data.load`` with this artifact's manifest) lie in it as train.safetensors and test.safetensors.
    Raises ``DeviceError`` for an artifact of another device, for tools that are missing here, and for programs that would not start
    there; ``ArtifactError`` for damaged files; ``StorageError`` for an output that cannot be written (an old one stays as it was).
    """
    device = targets.load(device) if isinstance(device, str) else device
    if not str(output).endswith(".tar.gz"):
        raise InputError(f"output is {str(output)!r}; want a name that ends in .tar.gz")
    stored = artifact.read(folder, foreign=True)
    _check_device(stored.manifest, device, folder)
    files, notes = _native_files(device, stored.manifest, given)
    files |= {f"artifact/{name}": data for name, data in artifact.contents(folder).items()}
    files |= {"train.sh": _text("train.sh"), "README.md": _readme(device, stored.manifest, notes, files)}
    files |= _samples(samples)
    glibc = _check_native(files, device)
    packed = pack(files, _root(device.name))
    artifact.write_file(Path(output), packed)
    sizes = {name: len(files[name]) for name in sorted(files)}
    weights = sum(stored.manifest.state_bytes.get(role, 0) for role in artifact.MODEL_ROLES)
    return Bundle(str(output), device.name, len(packed), sum(sizes.values()), weights, glibc, sizes, notes)


def _root(device: str) -> str:
    return f"tvmtrain-{device}"


def _samples(samples: Data | None) -> dict[str, bytes]:
    parts = {"train": samples.train, "test": samples.test} if samples is not None else {}
    return {f"{name}.safetensors": data.encoded(part) for name, part in parts.items() if part is not None}


def pack(files: Mapping[str, bytes], root: str) -> bytes:
    """``files`` by name as a .tar.gz of the folder ``root``: sorted, without times and owners, so that equal files make equal bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in sorted(files):
            entry = tarfile.TarInfo(f"{root}/{name}")
            entry.size = len(files[name])
            entry.mode = 0o755 if name.startswith(STARTED) else 0o644
            archive.addfile(entry, io.BytesIO(files[name]))
    return gzip.compress(buffer.getvalue(), 9, mtime=0)


def _check_device(manifest: Manifest, device: Device, folder: str | os.PathLike[str]) -> None:
    """Raise ``DeviceError`` unless the artifact was compiled for ``device``."""
    name, arch = manifest.device.get("name"), manifest.device.get("arch")
    if (name, arch) != (device.name, device.arch):
        raise DeviceError(
            f"{folder} was compiled for {name!r} ({arch}), not for {device.name!r} ({device.arch}): "
            f"deploy it for {name!r}, or compile it with --device {device.name}"
        )
    if manifest.device.get("target") != device.to_dict()["target"]:
        raise DeviceError(
            f"{folder} was compiled for {name!r} when its target was {manifest.device.get('target')}, and now it is "
            f"{device.to_dict()['target']}: compile it again"
        )


# TVM's libraries and the runner.


def _native_files(device: Device, manifest: Manifest, given: Sequence[Path]) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Libraries, programs, header and licenses by their names in the bundle, and what there is to say about them."""
    packages = Package("apache-tvm", _version(manifest)), Package("apache-tvm-ffi", metadata.version("apache-tvm-ffi"))
    wheels.check(packages, device.arch, given)
    tvm, ffi = (wheels.find(package, device.arch, given) for package in packages)
    libraries = _named("lib", wheels.files(tvm, RUNTIME) | wheels.files(ffi, FFI))
    files = libraries | _licenses(tvm, "tvm") | _licenses(ffi, "tvm-ffi")
    notes: tuple[str, ...] = ()
    if device.gpu is not None:
        gpu = _named("lib", wheels.files(tvm, GPU_RUNTIME))
        notes = _gpu_notes(elf.read(gpu[f"lib/{GPU_LIBRARY}"], GPU_LIBRARY), manifest, device)
        # Where it cannot be loaded, the user puts the board's own in its place.
        files |= {} if _needs_newer_cuda(elf.read(gpu[f"lib/{GPU_LIBRARY}"], GPU_LIBRARY), device) else gpu
    return files | _programs(device, libraries), notes


def _version(manifest: Manifest) -> str:
    """That of apache-tvm which made the code."""
    return str(manifest.versions.get("tvm", "unknown"))


def _named(folder: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {f"{folder}/{name.rpartition('/')[2]}": data for name, data in files.items()}


def _licenses(wheel: Path, package: str) -> dict[str, bytes]:
    return {f"licenses/{package}-{name}": text for name, text in wheels.licenses(wheel).items()}


def _programs(device: Device, libraries: Mapping[str, bytes]) -> dict[str, bytes]:
    """The runner, the C library and its header, made to start on the device's system."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder) / "lib"
        here.mkdir()
        for name, data in libraries.items():
            (Path(folder) / name).write_bytes(data)
        compiler = toolchain.find(device)
        files = _built(Path(folder) / "first", here, compiler)
        if not _too_new(files, device):
            return files
        # The first compiler's C library is newer than the device's: one that is not.
        older = toolchain.find(device, glibc=device.glibc)
        return _built(Path(folder) / "second", here, older)


def _built(into: Path, libraries: Path, compiler: toolchain.Toolchain) -> dict[str, bytes]:
    into.mkdir()
    native.build(into, libraries, compiler.cxx)
    return {str(path.relative_to(into)): path.read_bytes() for path in sorted(into.rglob("*")) if path.is_file()}


def _elves(files: Mapping[str, bytes]) -> dict[str, Elf]:
    return {name: elf.read(data, name) for name, data in files.items() if data.startswith(b"\x7fELF")}


def _too_new(files: Mapping[str, bytes], device: Device) -> list[str]:
    """What in ``files`` asks for newer C and C++ libraries than the device's system has."""
    wrong = []
    for name, found in _elves(files).items():
        for library, asked, has in (("glibc", found.glibc, device.glibc), ("GLIBCXX", found.libstdcxx, device.libstdcxx)):
            if has and toolchain.version(asked) > toolchain.version(has):
                wrong.append(f"{name} asks for {library} {asked}")
    return wrong


def _check_native(files: Mapping[str, bytes], device: Device) -> str:
    """Raise ``DeviceError`` for native code that the device would refuse; the glibc that all of it together asks for."""
    for name, found in _elves(files).items():
        if found.arch != device.arch:
            raise DeviceError(
                f"{name} is for {found.arch}, and {device.name} is {device.arch}; are the wheels those of {device.arch}?"
            )
    if wrong := _too_new(files, device):
        raise DeviceError(
            f"{'; '.join(wrong)}, and {device.name} ({device.system}) has glibc {device.glibc} and GLIBCXX {device.libstdcxx}: "
            f"{toolchain.missing(device)}"
        )
    return max((found.glibc for found in _elves(files).values()), key=toolchain.version, default="")


# NVIDIA GPUs.


def _needs_newer_cuda(library: Elf, device: Device) -> bool:
    return bool(device.cuda_toolkit) and toolchain.version(_cuda_of(library)) > toolchain.version(device.cuda_toolkit)


def _cuda_of(library: Elf) -> str:
    """The version of CUDA's runtime library that it asks for: ``13`` of ``libcudart.so.13``."""
    return next((name.removeprefix("libcudart.so.") for name in library.needed if name.startswith("libcudart.so.")), "")


def _gpu_notes(library: Elf, manifest: Manifest, device: Device) -> tuple[str, ...]:
    notes = []
    if _needs_newer_cuda(library, device):
        notes.append(
            f"TVM's package has {GPU_LIBRARY} for CUDA {_cuda_of(library)}, and {device.system} has CUDA {device.cuda_toolkit}: the bundle "
            "comes without it; build it on the board, once, as its README says, and put it into lib/"
        )
    if refusal := cuda_compiler.refusal(manifest.versions.get("cuda", ""), device.cuda_toolkit):
        notes.append(refusal)
    return tuple(notes)


# Texts.


def _text(name: str) -> bytes:
    return resources.files("tvmtrain").joinpath("board", name).read_bytes()


def _needs(device: Device, files: Mapping[str, bytes]) -> str:
    """What there is to do on the board before the first start."""
    if device.gpu is None or f"lib/{GPU_LIBRARY}" in files:
        return "Nothing has to be installed here: no Python, no compiler."
    instead = f"; a bundle for `{device.name}-cpu` needs nothing" if f"{device.name}-cpu" in targets.names() else ""
    return (
        "It needs no Python, but one thing before the first start: the GPU's library, which is built here, once, with git, CMake and "
        f"CUDA's `nvcc` (\"The GPU's library\", below){instead}."
    )


def _readme(device: Device, manifest: Manifest, notes: Iterable[str], files: Mapping[str, bytes]) -> bytes:
    train, predict = (manifest.named[name] for name in ("train_step", "predict"))
    state = sum(manifest.state_bytes.values())
    arena = manifest.memory.entries["train_step"].arena
    recipe = Template(_text("cuda.md").decode()).substitute(version=_version(manifest)) if device.gpu else ""
    return (
        Template(_text("README.md").decode())
        .substitute(
            device=device.name,
            needs=_needs(device, files),
            description=device.description,
            system=device.system or "any Linux",
            glibc=device.glibc or "any",
            inputs=_shapes(train.inputs, ("input", "target")),
            outputs=_shapes(predict.outputs, ("output",)),
            batch=manifest.batch,
            lr=manifest.lr,
            megabytes=f"{(state + arena) / 2**20:.1f}",
            notes="".join(f"\n> {note}\n" for note in notes),
            cuda=recipe,
            features=", ".join(manifest.features) or "none",
        )
        .encode()
    )


def _shapes(specs: Iterable[artifact.TensorSpec], roles: Sequence[str]) -> str:
    return "\n".join(f"| `{s.name}` | {s.role} | {list(s.shape)} | {s.dtype} |" for s in specs if s.role in roles)
