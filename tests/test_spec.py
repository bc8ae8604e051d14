"""Optimizers, layers and update plans as plain values."""

from __future__ import annotations

from pathlib import Path

import pytest

from tvmtrain.errors import PlanError
from tvmtrain.spec import Layer, LayerUpdate, UpdatePlan


def layer(name: str, kind: str) -> Layer:
    return Layer(name, kind, (f"{name}.weight", f"{name}.bias"), (8, 8), (1, 8), (1, 8), 64, 32)


LAYERS = (
    layer("stem", "conv2d"),
    layer("stem_norm", "batch_norm"),
    layer("body", "conv2d"),
    layer("body_norm", "batch_norm"),
    layer("head", "conv2d"),
    layer("head_norm", "batch_norm"),
    layer("classifier", "linear"),
)


def test_full_names_every_layer() -> None:
    assert UpdatePlan.full(LAYERS).layers == {each.name: LayerUpdate() for each in LAYERS}


def test_last_takes_convolutions_from_the_end_and_the_linear_layers_after_them() -> None:
    plan = UpdatePlan.last(LAYERS, 2, weight=0.5, filter=2, select="random", scaling="paper")
    assert list(plan.layers) == ["body", "head", "classifier"]
    assert plan.layers["body"] == LayerUpdate(0.5, True, 2, "random", "paper")
    assert plan.layers["body"].patch == (2, 2)
    assert plan.layers["classifier"] == LayerUpdate()
    assert list(UpdatePlan.last(LAYERS, 1, batchnorm=True).layers) == ["head", "head_norm", "classifier"]
    assert list(UpdatePlan.last(LAYERS, 0).layers) == ["classifier"]


def test_more_convolutions_than_there_are() -> None:
    with pytest.raises(PlanError, match="this model has 3"):
        UpdatePlan.last(LAYERS, 4)


@pytest.mark.parametrize("patch", [None, 2, (2, 3)])
def test_toml_gives_the_plan_back(patch: int | tuple[int, int] | None, tmp_path: Path) -> None:
    plan = UpdatePlan({"features.1.conv": LayerUpdate(0.25, False, patch, "rotate", "paper"), 'odd "name"': LayerUpdate()})
    assert UpdatePlan.from_toml(plan.to_toml()) == plan
    path = tmp_path / "plan.toml"
    path.write_text(plan.to_toml(), encoding="utf-8")
    assert UpdatePlan.from_toml(path) == plan


def test_an_unknown_layer_lists_near_matches() -> None:
    with pytest.raises(PlanError, match=r"no layer 'clasifier'.*near matches: classifier"):
        UpdatePlan({"clasifier": LayerUpdate()}).check(LAYERS)


@pytest.mark.parametrize(
    "table",
    [
        '[layers."a"]\nweight = 2.0\n',
        '[layers."a"]\nselect = "best"\n',
        '[layers."a"]\nfilter = 0\n',
        '[layers."a"]\nfilter = [2]\n',
        '[layers."a"]\nfilter = true\n',
        '[layers."a"]\nscaling = "none"\n',
        '[layers."a"]\nwheight = 1.0\n',
        '[layers."a"]\nweight = "all"\n',
        '[layers."a"]\nbias = 1\n',
        "layers = 3\n",
        "this is not TOML\n",
        '[layer."a"]\nweight = 1.0\n',
    ],
)
def test_wrong_plans_are_refused(table: str) -> None:
    with pytest.raises(PlanError):
        UpdatePlan.from_toml(table)
