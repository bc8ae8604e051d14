"""The plans of the papers: the files are what the published tables say, and fit their models."""

from __future__ import annotations

import sys
from math import prod
from pathlib import Path

import pytest
from parity import quick_device

import tvmtrain as tt
from tvmtrain.spec import LayerUpdate, UpdatePlan

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import plans  # noqa: E402

networks = plans.networks


@pytest.mark.parametrize("name", ["mobilenetv2", "resnet18", "mcunet", "mcu_mobilenetv2"])
def test_files_are_the_published_plans_and_fit_their_models(name: str) -> None:
    if name.startswith("mcu") and not (networks.data_folder() / "README.md").is_file():
        pytest.skip(f"{networks.data_folder()} has no weights; TVMTRAIN_DATA names the folder")
    graph = tt.trace(*getattr(networks, name)(batch=1))
    files = {path.stem: path for path in (BENCHMARKS / "plans").glob(f"{name}-*.toml")}
    published = plans.published(name, graph.layers)
    assert set(files) == set(published)
    for file, plan in published.items():
        assert UpdatePlan.from_toml(files[file]) == plan
        applied = graph.apply(plan)
        assert {parameter.rpartition(".")[0] for parameter in applied.trained} == set(plan.layers)


def test_two_percent_of_the_weights_keep_two_percent_of_the_features() -> None:
    """The claim of dynamic gradient sparse update: 98% less memory for features with about 2% of the convolution weights."""
    if not (networks.data_folder() / "README.md").is_file():
        pytest.skip(f"{networks.data_folder()} has no weights; TVMTRAIN_DATA names the folder")
    dense = tt.trace(*networks.mcu_mobilenetv2(batch=1, size=128))
    sparse = dense.apply(plans.two_percent(dense.layers)).summary(against=dense, device=quick_device())
    layers = {layer.name: layer for layer in dense.layers if layer.kind == "conv2d"}
    biases = {name: layer.weight_shape[0] for name, layer in layers.items() if name in plans.two_percent(dense.layers).layers}
    weights = sum(cost.trained - biases.get(cost.name, 0) for cost in sparse.layers if cost.name in layers)
    assert 0.015 < weights / sum(prod(layer.weight_shape) for layer in layers.values()) < 0.025
    assert sparse.saved_features + sparse.saved_masks < 0.02 * sparse.against.saved_features
    assert sparse.saved_features < 256 * 1024


def test_a_scheme_names_convolutions_by_number_and_the_last_ones_for_their_biases() -> None:
    kinds = ["conv2d"] * 5 + ["linear"]
    layers = [tt.spec.Layer(f"l{i}", kind, (f"l{i}.weight",), (8, 8), (1, 8), (1, 8), 0, 0) for i, kind in enumerate(kinds)]
    plan = plans.mcunetv3(layers, plans.scheme(1, 2, (1, 4), 0.5, 1))
    assert plan.layers == {
        "l1": LayerUpdate(0.5, select="magnitude"),
        "l3": LayerUpdate(0.0),
        "l4": LayerUpdate(1.0),
        "l5": LayerUpdate(),
    }
