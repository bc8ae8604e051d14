"""The emulated GPU notices what a real one would not forgive."""

from __future__ import annotations

import ctypes
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import emulator
import pytest

HEAD = 'extern "C" __global__ void __launch_bounds__(64) kernel(float* __restrict__ x) {\n'


@pytest.fixture(scope="module")
def driver() -> Iterator[ctypes.CDLL]:
    """The emulated driver alone, without TVM."""
    if shutil.which("g++") is None:
        pytest.skip("no g++, which compiles for the emulated GPU")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "driver.so"
        emulator.compile_library(emulator.HERE / "driver.cc", library, [])
        yield ctypes.CDLL(str(library))


def launch(driver: ctypes.CDLL, body: str) -> tuple[int, list[float]]:
    """(error, x) after 64 threads have run ``body`` on 64 numbers."""
    module, kernel, x = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    assert driver.cuModuleLoadData(ctypes.byref(module), emulator.compile_source(HEAD + body + "\n}")) == 0
    assert driver.cuModuleGetFunction(ctypes.byref(kernel), module, b"kernel") == 0
    assert driver.cudaMalloc(ctypes.byref(x), ctypes.c_size_t(64 * 4)) == 0
    config = (ctypes.c_uint * 16)(1, 1, 1, 64, 1, 1)
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(x))
    error = driver.cuLaunchKernelEx(config, kernel, arguments, None)
    values = list((ctypes.c_float * 64).from_address(x.value or 0))
    driver.cudaFree(x)
    return error, values


def test_threads_wait_for_each_other(driver: ctypes.CDLL) -> None:
    swap = "__shared__ alignas(64) float s[64]; s[threadIdx.x] = threadIdx.x; __syncthreads(); x[threadIdx.x] = s[63 - threadIdx.x];"
    assert launch(driver, swap) == (0, [63 - i for i in range(64)])


def test_a_warp_exchanges_values(driver: ctypes.CDLL) -> None:
    assert launch(driver, "x[threadIdx.x] = __shfl_down_sync(~0u, float(threadIdx.x), 1, 32);")[1][:3] == [1, 2, 3]


def test_a_missing_barrier_shows(driver: ctypes.CDLL) -> None:
    race = "__shared__ alignas(64) float s[64]; x[threadIdx.x] = -1; __syncthreads(); s[threadIdx.x] = 1 + threadIdx.x;"
    _, values = launch(driver, race + " x[threadIdx.x] = s[(threadIdx.x + 32) % 64];")
    assert values != [1 + (i + 32) % 64 for i in range(64)]


def test_a_barrier_that_some_threads_pass_by_fails(driver: ctypes.CDLL) -> None:
    assert launch(driver, "if (threadIdx.x < 5) __syncthreads();")[0] == 719


def test_a_write_behind_the_end_fails(driver: ctypes.CDLL) -> None:
    assert launch(driver, "x[threadIdx.x + 1] = 0;")[0] == 700


def test_what_nobody_writes_is_no_number(driver: ctypes.CDLL) -> None:
    _, values = launch(driver, "if (threadIdx.x) x[threadIdx.x] = 0;")
    assert values[0] != values[0]
