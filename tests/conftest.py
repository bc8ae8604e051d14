"""What all tests share: every pass of every test leaves a well-formed module, and random numbers that repeat."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

# Before PyTorch: its threads wait for each other by spinning, which takes seconds per call where something else runs beside.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from tvm.ir.transform import PassContext
from tvm.relax.ir.instrument import WellFormedInstrument


@pytest.fixture(autouse=True)
def _well_formed() -> Iterator[None]:
    """TVM checks the module before and after each pass that runs in the test's own pass context."""
    with PassContext(opt_level=2, instruments=[WellFormedInstrument()]):
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
