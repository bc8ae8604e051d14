"""How much of this machine's NVIDIA GPU is idle, as ``nvidia-smi`` tells it."""

from __future__ import annotations

import ctypes
import subprocess

CUDA = "libcudart.so.13"  # which TVM has loaded
TIMEOUT = 20.0  # seconds


def idle_share() -> float | None:
    """The share of the last second or so in which no kernel ran on the GPU that TVM computes on; None where nothing tells."""
    if (address := _address()) is None:
        return None
    command = ["nvidia-smi", f"--id={address}", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)
        return 1 - float(told.stdout) / 100
    except (OSError, subprocess.SubprocessError, ValueError):  # a Jetson has none; some GPUs answer "[N/A]"
        return None


def _address() -> str | None:
    """The first GPU's place on the bus: nvidia-smi may number GPUs in another order than CUDA."""
    text = ctypes.create_string_buffer(32)
    try:
        failed = ctypes.CDLL(CUDA).cudaDeviceGetPCIBusId(text, len(text), 0)
    except (OSError, AttributeError):
        return None
    return None if failed else text.value.decode("ascii", errors="replace")
