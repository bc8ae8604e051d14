"""Compilers and linkers for the processors of devices: this machine's own, a cross compiler of Debian, or Zig from PyPI.

Code for a device needs a linker here; programs for it need a C++ compiler, and one whose C library is no newer than the device's.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tvmtrain import targets
from tvmtrain.errors import DeviceError
from tvmtrain.targets import Device

# Debian's and Ubuntu's name for a C++ compiler for a processor, and the file in it that tells the version of its C library.
DEBIAN_PACKAGE = "g++-{triple}"
ZIG_PACKAGE = "ziglang"
C_LIBRARY = "libc.so.6"
# Where a device's file names no C library, programs are made for this one: RHEL 8, Debian 10, Ubuntu 20.04 have it or a newer one.
OLD_GLIBC = "2.28"
_NATIVE = ("g++", "clang++", "c++")


@dataclass(frozen=True)
class Toolchain:
    """``c`` and ``cxx`` are the beginnings of a command that compiles or links for ``triple``; ``glibc`` is that of its C library."""

    name: str
    triple: str
    c: tuple[str, ...]
    cxx: tuple[str, ...]
    glibc: str

    def link(self, library: str, objects: Sequence[str], options: Sequence[str] = ()) -> None:
        """Make the shared library ``library`` of object files. Raises ``RuntimeError`` with the linker's words."""
        command = [*self.cxx, "-shared", "-fPIC", "-s", "-o", library, *options, *objects]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise RuntimeError(f"{self.name}: {error.strerror}") from error
        if done.returncode:
            raise RuntimeError(f"{self.name}: {(done.stderr or done.stdout).strip()}")

    @property
    def linker(self) -> Callable[..., None]:
        """``link`` as TVM's ``export_library`` takes it."""

        def fcompile(library: str, objects: Sequence[str], options: Sequence[str] = (), **_: object) -> None:
            self.link(library, objects, options)

        # Where no object file tells TVM what it is for.
        fcompile.get_target_triple = lambda: self.triple  # type: ignore[attr-defined]
        return fcompile


def find(device: Device, *, glibc: str | None = None) -> Toolchain:
    """What compiles for the processor of ``device``; with a C library no newer than ``glibc``, if one is given.

    Raises ``DeviceError`` naming what to install.
    """
    found = list(installed(device))
    for toolchain in found:
        if glibc is None or version(toolchain.glibc) <= version(glibc):
            return toolchain
    if glibc is not None and found:
        names = ", ".join(f"{t.name} (glibc {t.glibc})" for t in found)
        raise DeviceError(
            f"programs for {device.name} must run with glibc {glibc}, and what compiles for {device.triple} here has a newer one: "
            f"{names}; install {ZIG_PACKAGE}, which makes programs for any glibc: pip install {ZIG_PACKAGE}"
        )
    raise DeviceError(f"nothing here links code for {device.triple}: {missing(device)}")


def missing(device: Device) -> str:
    """What to install to link for ``device``."""
    package = "g++" if device.arch == targets.architecture() else DEBIAN_PACKAGE.format(triple=device.triple.replace("_", "-"))
    return f"install {package} (Debian, Ubuntu: apt-get install {package}) or {ZIG_PACKAGE} (pip install {ZIG_PACKAGE})"


def installed(device: Device) -> Iterator[Toolchain]:
    """What there is here for ``device``, the best first."""
    triple = device.triple
    if device.arch == targets.architecture() and (found := _own()):
        yield _gnu(found, triple, _words("CC"))
    elif program := shutil.which(f"{triple}-g++"):
        yield _gnu((program,), triple)
    if importlib.util.find_spec(ZIG_PACKAGE) is not None:
        yield _zig(triple, device.glibc or OLD_GLIBC)


def version(text: str) -> tuple[int, ...]:
    """``2.31`` as numbers that compare."""
    return tuple(int(part) for part in re.findall(r"\d+", text))


def _own() -> tuple[str, ...]:
    """The command of this machine's C++ compiler: what CXX says, else the first that there is."""
    return _words("CXX") or next(((path,) for name in _NATIVE if (path := shutil.which(name))), ())


def _words(variable: str) -> tuple[str, ...]:
    """The command in an environment variable, which may have options, and a program before it: ``ccache g++ -m64``."""
    return tuple(shlex.split(os.environ.get(variable, "")))


def _gnu(cxx: tuple[str, ...], triple: str, c: tuple[str, ...] = ()) -> Toolchain:
    return Toolchain(shlex.join((os.path.basename(cxx[0]), *cxx[1:])), triple, c or tuple(map(_in_c, cxx)), cxx, _glibc_of(cxx))


def _in_c(word: str) -> str:
    """The C compiler beside the C++ compiler ``word``; options stay as they are."""
    if word.startswith("-"):
        return word
    folder, name = os.path.split(word)
    return os.path.join(folder, name.replace("clang++", "clang").replace("g++", "gcc").replace("c++", "cc"))


@cache
def _glibc_of(compiler: tuple[str, ...]) -> str:
    """The version that the compiler's C library tells of itself; where it does not, one that no device has."""
    try:
        asked = subprocess.run([*compiler, f"-print-file-name={C_LIBRARY}"], capture_output=True, text=True, check=False)
        text = Path(asked.stdout.strip()).read_bytes()
    except OSError:
        return "9999"
    found = re.search(rb"GNU C Library .* version (\d+\.\d+)", text)
    return found.group(1).decode() if found else "9999"


def _zig(triple: str, glibc: str) -> Toolchain:
    zig = (sys.executable, "-m", ZIG_PACKAGE)
    target = ("-target", f"{triple}.{glibc}")
    return Toolchain(f"{ZIG_PACKAGE} for glibc {glibc}", triple, (*zig, "cc", *target), (*zig, "c++", *target), glibc)
