"""What a board does for a session over the network, where it has Python: functions "tvmtrain.*" that TVM's RPC server finds.

    board() -> JSON                                   what the board is; ``PROTOCOL`` is the number of this list
    threads(count, cores) -> count                    of steps that start later; 0 and "": as the server was told
    start(file, gpu) -> machine                       the uploaded library on a virtual machine
    put(id, machine, dtype, bytes, *shape)            a tensor in the machine's memory, known by a number that the client gives
    get(id) -> bytes
    free(*ids)
    call(machine, entry, first, *ids) -> seconds      an entry on such tensors; its results are known from number ``first`` on
    watch(machine, on), marks() -> JSON               the ends of the virtual machine's calls (``runtime.Mark``)

Tensors stay on the board and a call names them by numbers: it takes one message, however many parameters a model has, and they are
overwritten in place as anywhere. ``native/src/session.cc`` has the same for boards without Python.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tvmtrain import artifact, features, runtime
from tvmtrain.artifact import Entry
from tvmtrain.errors import ArtifactError, DeviceError
from tvmtrain.runtime import Here, Mark

# Not before tvmtrain.runtime, which sees to it that TVM does not bring PyTorch along.
from tvm_ffi import register_global_func  # isort: skip

PROTOCOL = 1
FILL = "tvm.contrib.random.random_fill_for_measure"
ELF = b"\x7fELF"


@dataclass(frozen=True)
class Settings:
    """threads: of a session that asks for none (None: all physical cores); cores: that it may use (None: all);
    emulated: the person who started the server says so; log: where the server writes what happens, for error messages."""

    threads: int | None = None
    cores: tuple[int, ...] | None = None
    emulated: bool = False
    log: str = ""


@dataclass
class Session:
    """All that one session has; TVM's server runs each in a process of its own."""

    settings: Settings
    machines: list[Here] = field(default_factory=list)
    tensors: dict[int, Any] = field(default_factory=dict)
    marks: list[Mark] = field(default_factory=list)
    watching: AbstractContextManager[list[Mark]] | None = None
    asked: tuple[int, tuple[int, ...]] = (0, ())

    def board(self) -> str:
        """What this machine is."""
        return json.dumps(tell(self.settings))

    def threads(self, count: int, cores: str) -> int:
        """How many threads steps are going to have."""
        self.asked = int(count), tuple(int(core) for core in cores.split(",") if core)
        return self._threads()[0]

    def _threads(self) -> tuple[int, tuple[int, ...] | None]:
        count, cores = self.asked
        chosen = cores or self.settings.cores
        return count or self.settings.threads or runtime.default_threads(chosen), chosen

    def start(self, name: str, gpu: bool) -> int:
        """Load an uploaded library."""
        path = Path(runtime.get_global_func("tvm.rpc.server.workpath")(name))
        check_library(path)
        self.machines.append(Here(runtime.load_library(path), runtime.gpu() if gpu else runtime.tvm.cpu(), *self._threads()))
        return len(self.machines) - 1

    def put(self, number: int, machine: int, dtype: str, data: Any, *shape: int) -> None:
        """Keep a tensor."""
        value = np.frombuffer(bytes(data), dtype).reshape(shape)
        self.tensors[number] = self.machines[machine].tensor(value)

    def get(self, number: int) -> bytearray:
        """A tensor's values."""
        return bytearray(self.tensors[number].numpy().tobytes())

    def free(self, *numbers: int) -> None:
        """Forget tensors."""
        for number in numbers:
            self.tensors.pop(number, None)

    def call(self, machine: int, name: str, first: int, *numbers: int) -> float:
        """Run an entry and keep its results."""
        place = self.machines[machine]
        results = place.call(Entry(name, (), ()), [self.tensors[number] for number in numbers])
        self.tensors.update(enumerate(results, first))
        return place.seconds

    def watch(self, machine: int, on: bool) -> None:
        """Begin or end to note the virtual machine's calls."""
        if on and self.watching is None:
            self.watching = self.machines[machine].marked()
            self.marks = self.watching.__enter__()
        elif not on and self.watching is not None:
            self.watching.__exit__(None, None, None)
            self.watching = None

    def marks_(self) -> str:
        """What was noted."""
        return json.dumps(self.marks)


def register(settings: Settings) -> None:
    """Make the functions known to TVM in this process and in those that it forks."""
    session = Session(settings)
    functions: dict[str, Callable[..., Any]] = {
        **{name: getattr(session, name) for name in ("board", "threads", "start", "put", "get", "free", "call", "watch")},
        "marks": session.marks_,
    }
    for name, function in functions.items():
        register_global_func(f"tvmtrain.{name}", function, override=True)
    load_fill()


def load_fill() -> None:
    """The function by which MetaSchedule fills a kernel's arguments; TVM's runtime alone does not load it."""
    with suppress(OSError, RuntimeError):
        runtime.load_lib_ctypes("tvm", "tvm_runtime_extra", "RTLD_LOCAL", extra_lib_paths=runtime.package_lib_paths())
    if runtime.get_global_func(FILL, allow_missing=True) is None:
        register_global_func(FILL, _fill)


def _fill(tensor: Any) -> None:
    """Numbers in (0, 1), none of them subnormal; zeros where whole."""
    values = np.random.default_rng(0).uniform(0.1, 1.0, tensor.shape)
    whole = np.dtype(str(tensor.dtype)).kind != "f"
    tensor.copyfrom((values * (not whole)).astype(str(tensor.dtype)))


def tell(settings: Settings) -> dict[str, Any]:
    """What this machine is, in plain values."""
    memory = runtime.memory()
    return {
        "protocol": PROTOCOL,
        "server": "python",
        "name": platform.node(),
        "arch": artifact.machine(),
        "cores": len(settings.cores) if settings.cores else runtime.physical_cores(),
        "memory": memory.total,
        "available": memory.available,
        "hwcap": features.words(),
        "flags": features.flags(),
        "gpu": _has_gpu(),
        "emulated": emulated(settings),
        "log": settings.log,
    }


def emulated(settings: Settings) -> str:
    """Why times of this machine mean nothing; "" where it is what it says."""
    if settings.emulated:
        return "--emulated"
    if _text("/proc/self/comm").startswith("qemu-"):
        return "the process is run by qemu"
    if name := next((name for name in ("QEMU_CPU", "QEMU_LD_PREFIX") if name in os.environ), None):
        return f"{name} is set"
    # An emulator of processors alone shows the kernel's files of its host.
    foreign = artifact.machine() != "x86_64" and _cpu_info("vendor_id")
    return "/proc/cpuinfo is of an x86" if foreign else ""


def check_library(path: Path) -> None:
    """Raise ``ArtifactError`` for a library of another processor, of which the system says that there is no such file."""
    header, own = path.read_bytes()[:20], Path("/proc/self/exe").read_bytes()[:20]
    if len(header) < 20 or not header.startswith(ELF):
        raise ArtifactError(f"{path.name} is no shared library")
    if header[18:20] != own[18:20]:
        machines = [int.from_bytes(h[18:20], "little") for h in (header, own)]
        raise ArtifactError(
            f"{path.name} has code for another processor (ELF machine {machines[0]}; this one's is {machines[1]})"
        )


def _has_gpu() -> bool:
    try:
        return bool(runtime.gpu())
    except DeviceError:
        return False


def _cpu_info(name: str) -> str:
    lines = (line.partition(":") for line in _text("/proc/cpuinfo").splitlines())
    return next((value.strip() for found, _, value in lines if found.strip() == name), "")


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
