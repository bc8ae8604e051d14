"""The compiler passes of a training step, and the one list in which they run.

Each pass is a ``tvm.transform`` pass in a file of its own; any of them can stand in a ``Sequential`` of someone else's. They find
tensors by the PyTorch names that the functions carry as attributes (``tvmtrain.signature``).
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import relax
from tvm.ir.transform import Sequential

from tvmtrain.passes.append_optimizer import AppendOptimizer
from tvmtrain.passes.differentiate import Differentiate
from tvmtrain.passes.return_gradients import ReturnGradients
from tvmtrain.passes.stop_gradients import StopGradients
from tvmtrain.spec import Optimizer


def pipeline(trained: Sequence[str], optimizer: Optimizer, *, gradients: bool = False) -> Sequential:
    """``forward`` (inputs, targets, state -> loss, outputs, new state) becomes ``train_step`` with its update.

    gradients: keep an entry that returns the gradients, to compare them with PyTorch's.
    """
    return Sequential(
        [
            # 1. The backward: only towards what is trained.
            StopGradients(tuple(trained)),
            Differentiate(tuple(trained)),
            *([ReturnGradients()] if gradients else []),
            # 2. The update.
            AppendOptimizer(optimizer),
            # 3. Names that only rename, and what nothing reads.
            relax.transform.CanonicalizeBindings(),
            relax.transform.DeadCodeElimination(),
        ]
    )
