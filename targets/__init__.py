"""Devices a training step can be compiled for: one TOML file each, beside this module.

``host`` is the machine at hand, and ``cuda`` its NVIDIA GPU; what their files leave out is detected.
"""

from __future__ import annotations

import difflib
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from tvmtrain import features
from tvmtrain.errors import DeviceError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


_KINDS: dict[str, type] = {"str": str, "int": int, "Mapping[str, Any]": Mapping}


@dataclass(frozen=True)
class Caches:
    """Data caches of one core, in bytes (l3: of the whole chip; 0 where there is none)."""

    l1: int = 32 * 1024
    l2: int = 512 * 1024
    l3: int = 0


@dataclass(frozen=True)
class Device:
    """Where a step runs, and what its schedules need to know of the place.

    ``target`` is what ``tvm.target.Target`` accepts; ``arch`` is the processor's, beside a GPU too; ``cores`` are physical ones, or a
    GPU's multiprocessors; ``vector_bits`` and ``vector_registers`` describe one SIMD unit, or what a GPU's thread loads at once;
    ``memory`` is in bytes, 0 where unknown. What a bundle for the device has to keep to, "" where unknown: ``glibc`` and ``libstdcxx``
    (the newest GLIBCXX_ that its C++ library has) are those of its usual ``system``, ``cuda_toolkit`` the CUDA that comes with it.
    """

    name: str
    target: Mapping[str, Any]
    arch: str
    cores: int = 1
    vector_bits: int = 128
    vector_registers: int = 16
    caches: Caches = field(default_factory=Caches)
    memory: int = 0
    description: str = ""
    system: str = ""
    glibc: str = ""
    libstdcxx: str = ""
    cuda_toolkit: str = ""

    def __post_init__(self) -> None:
        _check_kinds(self)
        if self.cores < 1 or self.vector_bits < 64 or self.vector_registers < 8:
            raise DeviceError(
                f"device {self.name!r}: cores={self.cores}, vector_bits={self.vector_bits}, vector_registers="
                f"{self.vector_registers}; want at least 1 core, 64 bits and 8 registers"
            )

    @property
    def gpu(self) -> str | None:
        """The architecture of the NVIDIA GPU that the kernels run on, such as ``sm_87``; None where a processor runs them."""
        return str(self.target["arch"]) if self.target.get("kind") == "cuda" else None

    @property
    def triple(self) -> str:
        """The GNU name of what the processor's code is made for, such as ``aarch64-linux-gnu``; cross compilers begin with it."""
        host = self.target["host"] if self.gpu else self.target
        return str(host.get("mtriple", f"{self.arch}-linux-gnu"))

    def lanes(self, bits: int = 32) -> int:
        """How many elements of ``bits`` bits one vector register holds."""
        return max(1, self.vector_bits // bits)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; ``Device.from_dict`` reads them back."""
        return asdict(self) | {"target": dict(self.target)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Device:
        """A device from plain values, as in a TOML file. Raises ``DeviceError`` for fields that are unknown or missing."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        missing = sorted({"name", "target", "arch"} - set(values))
        if unknown or missing:
            raise DeviceError(
                f"device {values.get('name', '?')!r}: unknown fields {unknown}, missing fields {missing}; fields are {sorted(known)}"
            )
        return cls(**{**values, "caches": _caches(values)})


def names() -> tuple[str, ...]:
    """The devices that have a file here, sorted."""
    return tuple(sorted(_stem(f.name) for f in resources.files(__name__).iterdir() if f.name.endswith(".toml")))


def load(name: str) -> Device:
    """The device ``name``; raises ``DeviceError`` with near matches if there is none, or if its file is wrong."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "none is similar"
        raise DeviceError(f"no device named {name!r}: {hint} Known: {', '.join(names())}")
    values = _read(name)
    detect = values.pop("detect", None)
    if detect == "processor":
        values = {**_detect(), **values}
    if detect == "gpu":
        values = _with_gpu(values, _detect())
    return Device.from_dict({"name": name, **values})


def architecture() -> str:
    """This machine's processor, as ``Device.arch`` spells it."""
    return platform.machine().lower().replace("amd64", "x86_64").replace("arm64", "aarch64")


def gpu(arch: str) -> Device:
    """The device ``cuda`` with a GPU of another architecture than this machine's, such as ``sm_90``."""
    device = load("cuda")
    return replace(device, name=f"cuda-{arch}", target={**device.target, "arch": arch}, description=f"an NVIDIA GPU, {arch}")


def has_gpu() -> bool:
    """Whether TVM finds an NVIDIA GPU on this machine."""
    from tvm.runtime import cuda

    return bool(cuda(0).exist)


def _check_kinds(device: Device) -> None:
    """Raise ``DeviceError`` for a field of the wrong kind, or a target without what the compiler asks of it."""
    for f in fields(device):
        kind, value = _KINDS.get(f.type if isinstance(f.type, str) else "", object), getattr(device, f.name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise DeviceError(f"device {device.name!r}: {f.name} is {value!r}; want {kind.__name__}")
    versions = {name: getattr(device, name) for name in ("glibc", "libstdcxx", "cuda_toolkit")}
    if wrong := [f"{name}={value!r}" for name, value in versions.items() if not re.fullmatch(r"(\d+(\.\d+)*)?", value)]:
        raise DeviceError(f"device {device.name!r}: {', '.join(wrong)}; want a version such as 2.31")
    wanted = {"cuda": {"arch", "host"}}.get(str(device.target.get("kind")), set())
    if lacking := sorted(({"kind"} | wanted) - set(device.target)):
        raise DeviceError(f"device {device.name!r}: its target lacks {', '.join(lacking)}")


def _read(name: str) -> dict[str, Any]:
    text = resources.files(__name__).joinpath(f"{name}.toml").read_text(encoding="utf-8")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise DeviceError(f"targets/{name}.toml is not valid TOML: {error}") from error


def _stem(file: str) -> str:
    return file.removesuffix(".toml")


def _caches(values: Mapping[str, Any]) -> Caches:
    given = values.get("caches", {})
    if isinstance(given, Caches):
        return given
    if unknown := sorted(set(given) - {"l1", "l2", "l3"}):
        raise DeviceError(f"device {values.get('name', '?')!r}: unknown caches {unknown}; want l1, l2, l3 in bytes")
    return Caches(**given)


def _detect() -> dict[str, Any]:
    """What this machine is: the compiler's name for its processor, cores this process may use, caches, memory."""
    cores = len(_physical_cores())
    arch = architecture()
    target, bits = _host_target(arch, cores)
    registers = 16 if arch == "x86_64" and bits < 512 else 32
    return {
        "target": target,
        "arch": arch,
        "cores": cores,
        "vector_bits": bits,
        "vector_registers": registers,
        "caches": _host_caches(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _with_gpu(described: Mapping[str, Any], machine: Mapping[str, Any]) -> dict[str, Any]:
    """``machine`` with its first NVIDIA GPU, or with the one that is ``described`` where it has none."""
    from tvm.runtime import cuda

    target = {**described["target"], "host": machine["target"]}
    device = cuda(0)
    if not has_gpu():
        return {**described, "target": target, "arch": machine["arch"]}
    target["arch"] = f"sm_{device.compute_version.replace('.', '')}"
    found = {"cores": int(device.multi_processor_count), "memory": int(device.total_global_memory or 0)}
    return {**described, **found, "target": target, "arch": machine["arch"]}


def _host_target(arch: str, cores: int) -> tuple[dict[str, Any], int]:
    """The TVM target of this machine and its vector width in bits."""
    # Only a device that is detected needs the compiler; descriptions in TOML are read without it.
    from tvm.target import Target, codegen

    values: dict[str, Any] = {"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu(), "num-cores": cores}
    bits = max(128, int(codegen.llvm_get_vector_width(Target(values))))
    if (offered := features.offered()) is None:
        return values, bits
    # LLVM names a processor by family; a virtual machine may hide instructions that this family has.
    known = {str(feature) for feature in codegen.llvm_get_cpu_features(Target(values))}
    hidden = features.hidden(arch, known, offered)
    if hidden:
        values["mattr"] = [f"-{feature}" for feature in hidden]
    if arch == "x86_64":
        # LLVM's own vector width is this machine's, even where the family that it takes the processor for has narrower ones.
        bits = 512 if "avx512f" in known - set(hidden) else 256 if "avx" in known - set(hidden) else 128
    return values, bits


def _physical_cores() -> set[str]:
    """One entry per physical core among those this process may run on."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    return {_text(siblings.format(cpu)) or str(cpu) for cpu in usable}


def _host_caches() -> Caches:
    found: dict[str, int] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if _text(index / "type") in ("Data", "Unified"):
            found[f"l{_text(index / 'level')}"] = _bytes(_text(index / "size"))
    return Caches(**{level: size for level, size in found.items() if level in ("l1", "l2", "l3") and size})


def _bytes(size: str) -> int:
    """``32K`` or ``1M`` in bytes; 0 for anything else."""
    units = {"K": 1024, "M": 1024**2}
    return int(size[:-1]) * units[size[-1]] if size[-1:] in units and size[:-1].isdigit() else 0


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
