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
def _untuned(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What this machine was tuned for is no test's business."""
    monkeypatch.setenv("TVMTRAIN_RECORDS", str(tmp_path_factory.getbasetemp() / "no-records"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


# Ends of the names of tests that take long beside others of their kind; `pytest -m slow` runs them.
LONG = (
    *(f"test_theme[{name}]" for name in ("shapes", "elementwise", "reductions", "resizing", "pools", "losses", "activations")),
    *(f"test_theme[{name}]" for name in ("normalizations", "transposed_convolutions")),
    "test_modules_with_weights",
    "test_network_with_batch_statistics_in_double_precision[mobilenet_v2]",
    "test_network_with_running_statistics_in_single_precision[resnet]",
    "test_resnet18_of_the_torch_exporter_trains_with_the_same_losses",
    "test_two_percent_of_the_weights_keep_two_percent_of_the_features",
    "test_module_program_and_file_are_the_same[False]",
    *(f"test_results_of_any_kind[{kind}]" for kind in ("tuple", "list", "dict")),
    "test_a_trained_batchnorm_keeps_one_tensor[silu]",
    "test_network_with_batch_statistics_in_double_precision[resnet]",
    *(f"test_files_are_the_published_plans_and_fit_their_models[{name}]" for name in ("mcu_mobilenetv2", "mobilenetv2")),
    *(f"test_the_same_bits_as_without_these_passes[{name}]" for name in ("sgd", "adam", "adamw")),
    "test_steps_are_pytorchs[batch-double]",
    *(f"test_a_loss_that_is_not_finite_leaves_every_bit[{name}]" for name in ("sgd", "adam")),
    "test_one_that_says_nothing_or_nonsense_keeps_nobody_out[python]",
    "test_a_search_without_boards_says_so",
    *(f"test_thousands_of_wrong_{kind}[1]" for kind in ("manifests", "tensor_files")),
    "test_many_kernels_are_compiled_in_parts_for_a_board_too",
    "test_resnet18_of_a_foreign_exporter_trains_with_the_same_losses",
    "test_steps_in_strips_are_the_same_steps",
    "test_table_of_the_gradient_filtering_paper[ResNet18]",
    *(f"test_theme[{name}]" for name in ("convolutions", "products")),
    "test_pools_of_any_geometry",
    "test_convolutions_of_any_geometry",
    "test_strips_compute_what_pytorch_computes",
    "test_what_cannot_be_made_smaller_is_said",
    "test_strips_are_tried_where_only_a_kernel_is_too_large",
    "test_peers_may_train_more_than_a_plan",
    "test_a_comparison_goes_on_without_those_who_fail",
    "test_all_compute_the_same[dense]",
    "test_masks_are_kept_instead_of_activations",
    "test_the_arena_is_what_the_runtime_allocates[train_step]",
    "test_a_trained_batchnorm_keeps_one_tensor[relu6]",
    "test_channels_are_those_of_python",
    "test_files_are_the_published_plans_and_fit_their_models[mcunet]",
    *(f"test_network_with_batch_statistics_in_double_precision[{name}]" for name in ("vit", "squeezenet")),
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.name.endswith(LONG):
            item.add_marker(pytest.mark.slow)
