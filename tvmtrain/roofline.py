"""How fast this machine computes and how fast its memory is: the two ceilings that a kernel is measured against.

With the compiler, kernels of its own: multiply-adds on sums that stay in registers, and a triad a = b + s * c of arrays that no cache
holds. With the runtime alone, NumPy on as many threads, each with its own work: a matrix product, which comes close to the first, and
the same triad in two passes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tvmtrain.errors import DeviceError

# Independent sums in flight: a processor needs latency times units of them (8 to 16), and they have to fit its registers.
SUMS = (8, 12, 16, 24)
STEPS = 200_000
# Arrays of the triad are this many times the last cache.
TIMES_CACHE = 4
CACHE = 8 * 2**20  # bytes, where the system does not tell
TRIALS = 5
MATRIX = 768
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
MEMORY = Path("/proc/meminfo")
# NumPy's libraries for matrix products each have a variable of their own.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Roofline:
    """flops: multiply-adds (two operations each) in float32, per second; bandwidth: bytes read and written, per second.

    ``threads`` computed; ``source`` says with what: "compiler" or "numpy".
    """

    flops: float
    bandwidth: float
    threads: int
    source: str

    def __post_init__(self) -> None:
        if not self.flops > 0 or not self.bandwidth > 0:
            raise DeviceError(f"measured {self.flops} operations and {self.bandwidth} bytes per second; want more than 0")

    def seconds(self, flops: float, nbytes: float) -> float:
        """The least time for so many operations and bytes."""
        return max(flops / self.flops, nbytes / self.bandwidth)

    def computes(self, flops: float, nbytes: float) -> bool:
        """Whether arithmetic, not memory, bounds them."""
        return flops / self.flops >= nbytes / self.bandwidth


def measure(threads: int) -> Roofline:
    """On ``threads`` threads, the best of some trials: a second or two. TVM's pool has as many already (``runtime.use_threads``)."""
    if has_compiler():
        return Roofline(_compiled_flops(threads), _compiled_bandwidth(threads), threads, "compiler")
    return _by_numpy(threads)


def has_compiler() -> bool:
    """Whether TVM's compiler is installed, and not left out on purpose."""
    return os.environ.get("TVM_USE_RUNTIME_LIB") != "1" and importlib.util.find_spec("tvm.relax") is not None


def array_length(threads: int) -> int:
    """Numbers in one float32 array of the triad, a multiple of ``threads``; three of them leave half of the free memory."""
    free = next((int(kb) * 1024 for kb in re.findall(r"MemAvailable:\s+(\d+)", _text(MEMORY))), 2**40)
    length = min(TIMES_CACHE * _last_cache(), free // 6) // 4
    return max(1, length // (threads * 1024)) * threads * 1024


def _last_cache() -> int:
    """Bytes of the largest cache."""
    sizes = (_text(path) for path in CACHES.glob("index*/size"))
    return max((int(size[:-1]) * 1024 for size in map(str.strip, sizes) if size.endswith("K")), default=CACHE)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _best(run: Callable[[], Any], trials: int = TRIALS) -> float:
    """The shortest time, in seconds, of ``run`` once warm."""
    run()
    return min(_seconds(run) for _ in range(trials))


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# With the compiler.


def _compiled_flops(threads: int) -> float:
    return max(_rate_of(threads, sums) for sums in SUMS)


def _rate_of(threads: int, sums: int) -> float:
    """Operations per second of ``sums`` vectors on each thread."""
    import tvm
    from tvm.script import tirx as T

    from tvmtrain import targets

    host = targets.load("host")
    lanes = host.lanes()

    @T.prim_func(s_tir=True)
    def main(data: T.handle) -> None:
        out = T.match_buffer(data, (threads, sums, lanes), "float32")
        for thread in T.parallel(threads):
            with T.sblock("thread"):
                t = T.axis.spatial(threads, thread)
                total = T.sblock_alloc_buffer((sums, lanes), "float32", scope="local")
                for i in T.unroll(sums):
                    for j in T.vectorized(lanes):
                        total[i, j] = out[t, i, j]
                for _ in range(STEPS):
                    for i in T.unroll(sums):
                        for j in T.vectorized(lanes):
                            total[i, j] = total[i, j] * T.float32(0.999) + T.float32(0.001)
                for i in T.unroll(sums):
                    for j in T.vectorized(lanes):
                        out[t, i, j] = total[i, j]

    run = tvm.compile(tvm.IRModule({"main": main}), target=tvm.target.Target(dict(host.target)))["main"]
    out = tvm.runtime.tensor(np.zeros((threads, sums, lanes), "float32"))
    return 2 * threads * sums * lanes * STEPS / _best(lambda: run(out))


def _compiled_bandwidth(threads: int) -> float:
    """Bytes per second of a triad."""
    import tvm
    from tvm.script import tirx as T

    from tvmtrain import targets

    host = targets.load("host")
    lanes, length = host.lanes(), array_length(threads)
    rows = length // threads // lanes

    @T.prim_func(s_tir=True)
    def main(to: T.handle, first: T.handle, second: T.handle) -> None:
        a = T.match_buffer(to, (threads, rows, lanes), "float32")
        b = T.match_buffer(first, (threads, rows, lanes), "float32")
        c = T.match_buffer(second, (threads, rows, lanes), "float32")
        for t in T.parallel(threads):
            for i in range(rows):
                for j in T.vectorized(lanes):
                    with T.sblock("triad"):
                        vt, vi, vj = T.axis.remap("SSS", [t, i, j])
                        a[vt, vi, vj] = b[vt, vi, vj] + T.float32(3) * c[vt, vi, vj]

    run = tvm.compile(tvm.IRModule({"main": main}), target=tvm.target.Target(dict(host.target)))["main"]
    arrays = [tvm.runtime.tensor(np.ones((threads, rows, lanes), "float32")) for _ in range(3)]
    return 3 * 4 * length / _best(lambda: run(*arrays))


# With NumPy, in a process of its own: its libraries read how many threads they may start when they are loaded, and ours start none.


def _by_numpy(threads: int) -> Roofline:
    command = [sys.executable, "-c", f"from tvmtrain import roofline; print(roofline.numpy_rates({threads}))"]
    done = subprocess.run(command, env=os.environ | ONE_THREAD, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DeviceError(f"the peak rates of this machine could not be measured: {done.stderr.strip().splitlines()[-1:]}")
    flops, bandwidth = json.loads(done.stdout)
    return Roofline(flops, bandwidth, threads, "numpy")


def numpy_rates(threads: int) -> list[float]:
    """Operations and bytes per second."""
    with ThreadPoolExecutor(threads) as pool:
        products = [np.ones((3, MATRIX, MATRIX), "float32") for _ in range(threads)]
        flops = 2 * threads * MATRIX**3 / _best(lambda: list(pool.map(_multiply, products)))
        length = array_length(threads) // threads
        triads = [np.ones((3, length), "float32") for _ in range(threads)]
        # The sum is read and written once more than in one pass.
        bandwidth = 5 * 4 * length * threads / _best(lambda: list(pool.map(_triad, triads)))
    return [flops, bandwidth]


def _multiply(arrays: Iterator[np.ndarray]) -> None:
    a, b, c = arrays
    np.matmul(b, c, out=a)


def _triad(arrays: Iterator[np.ndarray]) -> None:
    a, b, c = arrays
    np.multiply(c, np.float32(3), out=a)
    np.add(a, b, out=a)
