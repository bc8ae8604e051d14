"""The compiler passes of a training step, and the one list in which they run.

Each pass is a ``tvm.transform`` pass in a file of its own; any of them can stand in a ``Sequential`` of someone else's. They find
tensors by the PyTorch names that the functions carry as attributes (``tvmtrain.signature``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import tvm
import tvm_ffi
from tvm import relax
from tvm.ir.transform import Pass, Sequential

from tvmtrain.errors import PlanError
from tvmtrain.passes.append_optimizer import AppendOptimizer
from tvmtrain.passes.differentiate import Differentiate
from tvmtrain.passes.drop_unread import DropUnread
from tvmtrain.passes.expand_norms import ExpandNorms
from tvmtrain.passes.fold_padding import FoldPadding
from tvmtrain.passes.gather_early import GatherEarly
from tvmtrain.passes.gradient_filter import GradientFilter
from tvmtrain.passes.guard_state import GuardState
from tvmtrain.passes.hoist_saved import HoistSaved
from tvmtrain.passes.in_strips import InStrips
from tvmtrain.passes.pack_masks import PackMasks
from tvmtrain.passes.pooled_domain import PooledDomain
from tvmtrain.passes.prune_frozen import PruneFrozen
from tvmtrain.passes.recompute import Recompute
from tvmtrain.passes.return_gradients import ReturnGradients
from tvmtrain.passes.scale_weights import ScaleWeights
from tvmtrain.passes.sparse_update import SparseUpdate
from tvmtrain.passes.stop_gradients import StopGradients
from tvmtrain.spec import Optimizer

# TVM's calls into a pass let only errors through whose names it knows; others arrive as RuntimeErrors.
tvm_ffi.register_error(PlanError)


@dataclass(frozen=True)
class Training:
    """What a step trains, by the names of parameters.

    trained: parameters that the step updates. sparse: weight -> how many of its input channels are trained in a step; fixed: those
    of them whose channels never change. filtered: weight of a convolution, trained or not -> patch (rows, columns) of its gradients;
    scaling: weight -> "unbiased" or "paper", unbiased where it is not named. strips: bytes that a part of the forward may need at once;
    None: nothing is computed in strips.
    """

    trained: Sequence[str]
    sparse: Mapping[str, int] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()
    filtered: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    scaling: Mapping[str, str] = field(default_factory=dict)
    strips: int | None = None


def check(training: Training, mod: tvm.IRModule) -> None:
    """Raise PlanError for a layer that cannot be trained so."""
    Sequential(_views(training))(mod)


def pipeline(training: Training, optimizer: Optimizer, *, gradients: bool = False) -> Sequential:
    """``forward`` (inputs, targets, state -> loss, outputs, new state) becomes ``train_step`` with its update.

    gradients: keep an entry that returns the gradients, to compare them with PyTorch's.
    """
    return Sequential([step(training, optimizer, gradients=gradients), arrangement(training)])


def step(training: Training, optimizer: Optimizer, *, gradients: bool = False) -> Sequential:
    """The first half of ``pipeline``: what a step computes, and which features each layer keeps. Layers' costs are known after it."""
    trained = tuple(training.trained)
    return Sequential(
        [
            # 1. What of a weight is trained, and by which gradient; what nothing trains is inference.
            *_views(training),
            PruneFrozen(trained),
            # 2. The backward: only towards what is trained.
            StopGradients(trained),
            Differentiate(trained),
            ExpandNorms(),
            PooledDomain(),
            *([ReturnGradients()] if gradients else []),
            # 3. The update.
            AppendOptimizer(optimizer, training.fixed),
            # The names of results, so that a guard finds the value itself.
            relax.transform.CanonicalizeBindings(),
            GuardState(),
            # 4. Names that only rename, what nothing reads, and scales that cost less elsewhere.
            relax.transform.CanonicalizeBindings(),
            relax.transform.DeadCodeElimination(),
            DropUnread(),
            ScaleWeights(),
            # 5. What the forward keeps for the backward. These decide what a layer keeps; what follows changes no layer's costs.
            Recompute(),
            GatherEarly(),
        ]
    )


def arrangement(training: Training) -> Sequential:
    """The second half of ``pipeline``: the same with less in memory at once."""
    return Sequential(
        [
            # 6. As what, and since when, it is kept.
            HoistSaved(),
            PackMasks(),
            # 7. What of the forward is computed in strips, if the memory for all of it is not there.
            *([] if training.strips is None else [InStrips(training.strips)]),
        ]
    )


def _views(training: Training) -> list[Pass]:
    return [FoldPadding(), SparseUpdate(training.sparse), GradientFilter(training.filtered, training.scaling)]
