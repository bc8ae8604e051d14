"""An NVIDIA GPU for tests where there is none: TVM's CUDA runtime over an emulation of CUDA's, kernels compiled for the processor.

It shows whether kernels compute what they should, synchronization included, and whether state and data reach the device. It says
nothing about speed, and a processor's rounding stands for a GPU's.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import tvm

from tvmtrain import cuda_compiler, runtime

HERE = Path(__file__).parent / "emulated_gpu"
KERNEL = re.compile(r'^extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\([^;{]*\) \{$', re.MULTILINE)


def needed() -> bool:
    """Whether this process has no GPU but, perhaps, the emulated one."""
    return start.cache_info().currsize > 0 or not tvm.cuda(0).exist


@functools.cache
def start() -> None:
    """Give this process the emulated GPU: from then on ``tvm.cuda(0)`` exists."""
    folder = Path(tempfile.mkdtemp(prefix="emulated-gpu-"))
    (folder / "versions").write_text("libcudart.so.13 { global: cuda*; };")
    for name, options in (("libcudart.so.13", [f"-Wl,--version-script={folder / 'versions'}"]), ("libcuda.so.1", [])):
        library = folder / name
        compile_library(HERE / "driver.cc", library, [f"-Wl,-soname,{name}", *options])
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    shutil.rmtree(folder)
    runtime.load_gpu_runtime.cache_clear()
    runtime.load_gpu_runtime()
    assert tvm.cuda(0).exist


def compile_source(source: str, _arch: str = "") -> bytes:
    """What the emulated driver loads as a module: CUDA source as a shared library for this processor."""
    source = cuda_compiler.legal_names(source).replace("__shared__ alignas(64)", "alignas(64) static")
    starts = list(KERNEL.finditer(source))
    ends = [*(start.start() for start in starts[1:]), len(source)]
    lines = ['#include "kernels.h"', source[source.index('extern "C" __global__') :]]
    for start, end in zip(starts, ends, strict=True):
        name = start.group(1)
        synchronizes = int(bool(re.search(r"__sync|__shfl", source[start.end() : end])))
        lines.append(f'extern "C" void {name}__run(void** p) {{ emulated::call({name}, p); }}')
        lines.append(f'extern "C" int {name}__synchronizes = {synchronizes};')
    with tempfile.TemporaryDirectory() as folder:
        text, library = Path(folder) / "kernels.cc", Path(folder) / "kernels.so"
        text.write_text("\n".join(lines))
        compile_library(text, library, [f"-I{HERE}", "-w", "-fno-strict-aliasing"])
        code = library.read_bytes()
    return struct.pack("<Q", len(code)) + code


def compile_library(source: Path, library: Path, options: list[str]) -> None:
    """Raises ``AssertionError`` with what g++ said."""
    command = ["g++", "-O1", "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(library), *options, "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[:2000]
