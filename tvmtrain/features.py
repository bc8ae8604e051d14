"""Instruction sets that compiled loops may use, by the names of Linux's /proc/cpuinfo: what code needs, and what a machine has.

Ciphers, checksums and the like are left out: loops never use them, and LLVM takes some boards' cores (Raspberry Pi's) to have them.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# The words of the auxiliary vector: AT_HWCAP and AT_HWCAP2 of <elf.h>.
HWCAP, HWCAP2 = 16, 26


@dataclass(frozen=True)
class Feature:
    """``name`` is the kernel's, ``llvm`` the compiler's; on aarch64, ``bit`` of ``word`` of the auxiliary vector shows it."""

    name: str
    llvm: str
    word: int = 0
    bit: int = 0


# <asm/hwcap.h> of Linux; tvmtrain/native has the same rows.
AARCH64 = (
    Feature("fp", "fp-armv8", HWCAP, 0),
    Feature("asimd", "neon", HWCAP, 1),
    Feature("atomics", "lse", HWCAP, 8),
    Feature("fphp", "fullfp16", HWCAP, 9),
    Feature("asimdhp", "fullfp16", HWCAP, 10),
    Feature("asimdrdm", "rdm", HWCAP, 12),
    Feature("jscvt", "jsconv", HWCAP, 13),
    Feature("fcma", "complxnum", HWCAP, 14),
    Feature("lrcpc", "rcpc", HWCAP, 15),
    Feature("asimddp", "dotprod", HWCAP, 20),
    Feature("sve", "sve", HWCAP, 22),
    Feature("asimdfhm", "fp16fml", HWCAP, 23),
    Feature("ilrcpc", "rcpc-immo", HWCAP, 26),
    Feature("flagm", "flagm", HWCAP, 27),
    Feature("sve2", "sve2", HWCAP2, 1),
    Feature("flagm2", "altnzcv", HWCAP2, 7),
    Feature("frint", "fptoint", HWCAP2, 8),
    Feature("i8mm", "i8mm", HWCAP2, 13),
    Feature("bf16", "bf16", HWCAP2, 14),
)
_X86_SPELLED_ALIKE = (
    *("avx", "avx2", "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl", "bmi2", "f16c", "fma", "fma4", "gfni", "movbe"),
    *("popcnt", "sse4a", "ssse3", "tbm", "xop"),
)
X86_64 = (
    *(Feature(name, name) for name in _X86_SPELLED_ALIKE),
    Feature("pni", "sse3"),
    Feature("sse4_1", "sse4.1"),
    Feature("sse4_2", "sse4.2"),
    Feature("abm", "lzcnt"),
    Feature("bmi1", "bmi"),
    Feature("avx_vnni", "avxvnni"),
    Feature("avx512ifma", "avx512ifma"),
    Feature("avx512vbmi", "avx512vbmi"),
    Feature("avx512_vbmi2", "avx512vbmi2"),
    Feature("avx512_vnni", "avx512vnni"),
    Feature("avx512_bitalg", "avx512bitalg"),
    Feature("avx512_vpopcntdq", "avx512vpopcntdq"),
    Feature("avx512_bf16", "avx512bf16"),
    Feature("avx512_fp16", "avx512fp16"),
)
TABLES = {"aarch64": AARCH64, "x86_64": X86_64}


def needed(arch: str, llvm: Iterable[str]) -> tuple[str, ...]:
    """The kernel's names for what code may use that is compiled with the features ``llvm``; sorted."""
    used = {str(feature) for feature in llvm}
    return tuple(sorted(feature.name for feature in TABLES.get(arch, ()) if feature.llvm in used))


def hidden(arch: str, llvm: Iterable[str], offered: frozenset[str]) -> tuple[str, ...]:
    """The compiler's names for what it would use and a machine with the features ``offered`` lacks; sorted."""
    used = {str(feature) for feature in llvm}
    return tuple(sorted({f.llvm for f in TABLES.get(arch, ()) if f.llvm in used and f.name not in offered}))


def offered() -> frozenset[str] | None:
    """What this machine has, of the names in ``TABLES``; None where the system does not tell."""
    return told(platform.machine(), words(), flags())


def told(arch: str, words: Sequence[int], flags: str) -> frozenset[str] | None:
    """What a machine has that shows these ``words`` (on aarch64) or ``flags`` (on x86-64); None where they tell nothing."""
    arch = arch.lower()
    if arch in ("aarch64", "arm64") and any(words):
        shown = dict(zip((HWCAP, HWCAP2), words, strict=True))
        return frozenset(feature.name for feature in AARCH64 if shown[feature.word] >> feature.bit & 1)
    if arch in ("x86_64", "amd64") and flags:
        return frozenset(flags.split()) & {feature.name for feature in X86_64}
    return None


def words() -> tuple[int, int]:
    """Of the auxiliary vector: an emulator shows the emulated processor there, but its host's in /proc/cpuinfo. 0 where unknown."""
    try:
        getauxval = ctypes.CDLL(None).getauxval
    except (OSError, AttributeError):
        return 0, 0
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return getauxval(HWCAP), getauxval(HWCAP2)


def flags() -> str:
    """Of the first processor in /proc/cpuinfo; "" where there are none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("flags")), "")
