"""CUDA source to machine code for one architecture, without a GPU: ``nvcc`` where it is installed and knows the architecture,
else NVRTC, the same compiler as a library, from PyPI or the system.

No fast math: TVM's own call of nvcc asks for approximate division, exponentials and roots, and flushes small numbers to zero.
"""

from __future__ import annotations

import ctypes
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from tvmtrain.errors import DeviceError

# CUDA 12.9 is the last release that compiles for sm_50 to sm_72.
PACKAGE = "nvidia-cuda-nvrtc-cu12"
PACKAGES = {12: PACKAGE, 11: "nvidia-cuda-nvrtc-cu11"}
LIBRARIES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11.2")
# TVM names a kernel's arguments after the model's parameters, and "0.weight" begins as no name in C may.
_DIGIT_FIRST = re.compile(r"(?<![\w.])(?=\d+_[A-Za-z_])")

# What TVM's CUDA source includes, for NVRTC, which comes without headers; the type traits are named there, but never used.
HEADERS = {
    "cuda/std/cstdint": """
namespace cuda { namespace std {
typedef signed char int8_t; typedef unsigned char uint8_t; typedef short int16_t; typedef unsigned short uint16_t;
typedef int int32_t; typedef unsigned int uint32_t; typedef long long int64_t; typedef unsigned long long uint64_t;
} }
""",
    "cuda/std/type_traits": """
namespace cuda { namespace std {
template <class, class> struct is_same; template <class, class> inline constexpr bool is_same_v = false;
template <class A> inline constexpr bool is_same_v<A, A> = true;
template <class> struct is_integral; template <class> struct is_signed; template <class> struct is_unsigned;
template <class> struct is_floating_point; template <bool, class> struct enable_if; template <bool, class, class> struct conditional;
} }
""",
    "math_constants.h": """
#define CUDART_INF_F __int_as_float(0x7f800000)
#define CUDART_NAN_F __int_as_float(0x7fffffff)
#define CUDART_INF __longlong_as_double(0x7ff0000000000000ULL)
#define CUDART_NAN __longlong_as_double(0xfff8000000000000ULL)
""",
}


@dataclass(frozen=True)
class Compiler:
    """``run`` makes machine code of a source, for an architecture; ``version`` is that of its CUDA, such as ``12.9``."""

    name: str
    version: str
    run: Callable[[str, str], bytes]


def compile_source(source: str, arch: str, toolkit: str = "") -> bytes:
    """Machine code for ``arch`` (``sm_87``). Raises ``DeviceError`` where no installed compiler knows it, or it refuses the source."""
    return find(arch, toolkit).run(legal_names(source), arch)


def find(arch: str, toolkit: str = "") -> Compiler:
    """The compiler for an architecture, if there is one, one that suits the CUDA of the device.

    Raises ``DeviceError``, naming what to install.
    """
    found = list(_candidates(arch))
    for compiler in (*(c for c in found if suits(c.version, toolkit)), *found):
        return compiler
    raise DeviceError(
        f"no CUDA compiler for {arch} is installed: pip install {PACKAGE} (CUDA 12.9 compiles for sm_50 to sm_121), or put an "
        "nvcc that knows it on the PATH (CUDA 13 compiles for sm_75 and newer)"
    )


def refusal(version: str, toolkit: str) -> str:
    """Why a driver that came with CUDA ``toolkit`` may refuse code made by CUDA ``version``, and what to do; "" if it will not."""
    if suits(version, toolkit):
        return ""
    return (
        f"the GPU code was made by CUDA {version}, and the device's driver came with CUDA {toolkit}: drivers load code of their own "
        f"major version and older; {_older(_major(toolkit))}"
    )


def suits(version: str, toolkit: str) -> bool:
    """Whether a driver that came with CUDA ``toolkit`` ("": any) loads what CUDA ``version`` ("": nothing) makes.

    NVIDIA promises that within one major version from 11 on, and for code of older ones.
    """
    return not toolkit or not version or _major(version) <= _major(toolkit)


def _older(major: int) -> str:
    if major in PACKAGES:
        return f"pip install {PACKAGES[major]} here, and build again"
    return f"put the nvcc of CUDA {major} on the PATH here (not tried: it may be too old for TVM's sources), or build for its processor"


def legal_names(source: str) -> str:
    """The source with a letter before every name that begins with a digit."""
    return _DIGIT_FIRST.sub("v", source)


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def _candidates(arch: str) -> Iterator[Compiler]:
    if (nvcc := _nvcc()) and arch in _nvcc_architectures(nvcc):
        yield Compiler(nvcc, _nvcc_version(nvcc), partial(_run_nvcc, nvcc))
    for path in _nvrtc_libraries():
        library = _nvrtc(path)
        if library is not None and int(arch.removeprefix("sm_")) in _nvrtc_architectures(path):
            yield Compiler(path, _nvrtc_version(library), partial(_run_nvrtc, library))


# nvcc.


def _nvcc() -> str | None:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return shutil.which("nvcc") or shutil.which(
        "nvcc", path=os.pathsep.join(f"{home}/bin" for home in [*homes, "/usr/local/cuda"])
    )


@cache
def _nvcc_architectures(nvcc: str) -> tuple[str, ...]:
    found = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    return tuple(found.stdout.split())


@cache
def _nvcc_version(nvcc: str) -> str:
    """``release 12.9`` of what nvcc says of itself; where it does not, one that suits no device."""
    found = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    told = re.search(r"release (\d+\.\d+)", found.stdout)
    return told.group(1) if told else "9999"


def _run_nvcc(nvcc: str, source: str, arch: str) -> bytes:
    """Machine code for ``arch``, and PTX, which drivers compile for newer ones."""
    number = arch.removeprefix("sm_")
    with tempfile.TemporaryDirectory() as folder:
        text, code = Path(folder) / "kernels.cu", Path(folder) / "kernels.fatbin"
        text.write_text(source, encoding="utf-8")
        both = f"-gencode=arch=compute_{number},code=[sm_{number},compute_{number}]"
        command = [nvcc, "--fatbin", "--std=c++17", both, "-o", str(code), str(text)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise DeviceError(f"{nvcc} cannot compile kernels for {arch}: {_first_lines(done.stderr or done.stdout)}")
        return code.read_bytes()


# NVRTC.


def _nvrtc_libraries() -> tuple[str, ...]:
    """Where NVRTC may be, the newest first: packages of PyPI, then wherever the system's loader looks."""
    folders = [p for place in sys.path for p in glob.glob(f"{place}/nvidia/*/lib")]
    packaged = [path for name in LIBRARIES for folder in folders for path in glob.glob(f"{folder}/{name}")]
    return (*packaged, *LIBRARIES)


@cache
def _nvrtc(path: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(path)
    except OSError:
        return None


def _nvrtc_version(library: ctypes.CDLL) -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


@cache
def _nvrtc_architectures(path: str) -> tuple[int, ...]:
    library = _nvrtc(path)
    count = ctypes.c_int()
    if library is None or library.nvrtcGetNumSupportedArchs(ctypes.byref(count)):
        return ()
    found = (ctypes.c_int * count.value)()
    library.nvrtcGetSupportedArchs(found)
    return tuple(found)


def _run_nvrtc(library: ctypes.CDLL, source: str, arch: str) -> bytes:
    program = ctypes.c_void_p()
    contents = (ctypes.c_char_p * len(HEADERS))(*[text.encode() for text in HEADERS.values()])
    names = (ctypes.c_char_p * len(HEADERS))(*[name.encode() for name in HEADERS])
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", len(HEADERS), contents, names)
    try:
        options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17"]
        failed = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if failed:
            log = _nvrtc_text(library, program, "ProgramLog").decode(errors="replace")
            raise DeviceError(f"NVRTC cannot compile kernels for {arch}: {_first_lines(log)}")
        return _nvrtc_text(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _nvrtc_text(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    library[f"nvrtcGet{what}Size"](program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    library[f"nvrtcGet{what}"](program, text)
    return text.raw


def _first_lines(log: str) -> str:
    errors = [line for line in log.splitlines() if "error" in line] or log.splitlines()
    return "; ".join(errors[:3])
