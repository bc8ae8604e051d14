"""What a native library or program asks of the system that loads it, read from the file itself: no binutils, nothing is loaded."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from tvmtrain.errors import DeviceError

MACHINES = {62: "x86_64", 183: "aarch64"}
_DYNAMIC, _VERNEED = 6, 0x6FFFFFFE
_NEEDED = 1
MOST = 4096  # versions of symbols in one file; TVM's libraries have a few dozen
# e_machine and e_shoff, e_shentsize, e_shnum of a 64-bit little-endian file; a section's type, offset, size and link.
_HEADER = struct.Struct("<4sBB10x2xH4x16xQ10xHH2x")
_SECTION = struct.Struct("<4xI16xQQI20x")


@dataclass(frozen=True)
class Elf:
    """``needed`` libraries, and ``versions`` of their symbols, such as ``GLIBC_2.27``, by the name of the library."""

    arch: str
    needed: tuple[str, ...]
    versions: tuple[str, ...]

    @cached_property
    def glibc(self) -> str:
        """The oldest glibc that has all it asks for, such as ``2.27``; "" if it asks for none."""
        return self._newest("GLIBC_")

    @cached_property
    def libstdcxx(self) -> str:
        """The same of ``GLIBCXX_``: the C++ library's."""
        return self._newest("GLIBCXX_")

    def _newest(self, prefix: str) -> str:
        found = [v.removeprefix(prefix) for v in self.versions if re.fullmatch(rf"{prefix}\d+(\.\d+)*", v)]
        return max(found, key=lambda v: tuple(map(int, v.split("."))), default="")


def read(data: bytes, name: str) -> Elf:
    """What the file ``name`` with the content ``data`` asks for. Raises ``DeviceError`` if it is no 64-bit ELF file, or is damaged."""
    try:
        return _read(data)
    except (struct.error, IndexError, ValueError, OverflowError) as error:
        raise DeviceError(f"{name} is no sound native library or program of a 64-bit Linux ({error})") from error


def _read(data: bytes) -> Elf:
    magic, bits, order, machine, offset, size, count = _HEADER.unpack_from(data)
    if magic != b"\x7fELF" or (bits, order) != (2, 1):
        raise ValueError("its head is another one")
    sections = [_SECTION.unpack_from(data, offset + i * size) for i in range(count)]
    needed: list[str] = []
    versions: list[str] = []
    for kind, start, length, link in sections:
        strings = sections[link][1] if link < len(sections) else 0
        if kind == _DYNAMIC:
            needed += _needed(data, start, length, strings)
        if kind == _VERNEED:
            versions += islice(_versions(data, start, strings), MOST + 1)
    if len(versions) > MOST:
        raise ValueError("it asks for too many versions")
    return Elf(MACHINES.get(machine, f"machine {machine}"), tuple(needed), tuple(sorted(set(versions))))


def _needed(data: bytes, start: int, length: int, strings: int) -> Iterator[str]:
    for tag, value in struct.iter_unpack("<QQ", data[start : start + length - length % 16]):
        if tag == _NEEDED:
            yield _text(data, strings + value)


def _versions(data: bytes, start: int, strings: int) -> Iterator[str]:
    """Elf64_Verneed entries, each with its Elf64_Vernaux; offsets lead to the next, 0 ends."""
    for _ in range(MOST):
        _, count, _, first, following = struct.unpack_from("<HHIII", data, start)
        place = start + first
        for _ in range(count):
            _, _, _, name, after = struct.unpack_from("<IHHII", data, place)
            yield _text(data, strings + name)
            place += after
        if not following:
            return
        start += following
    raise ValueError("its list of versions does not end")


def _text(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode()
