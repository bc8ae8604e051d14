"""The benchmark of the paper's layers: it measures what the passes emit, and computes what the paper says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tvmtrain import filtering
from tvmtrain.console import Console

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import paper_layers
from paper_layers import Filtered, Layer, Measured

SMALL = Layer(24, 6, 9, batch=2)


def test_the_forward_keeps_patches_and_summed_taps_and_nothing_else():
    mod = paper_layers.module(SMALL, 2)
    shapes = [[int(d) for d in v.ty.shape] for v in mod["backward"].params]
    assert sorted(shapes) == sorted([[2, 24, 3, 5], [24, 24, 1, 1], SMALL.map])
    results = [[int(d) for d in ty.shape] for ty in mod["backward"].ret_ty.fields]
    assert results == [SMALL.map, SMALL.weight], "full resolution, and all taps"
    assert filtering.PATCH_SUM in mod["forward"].script()
    assert filtering.PATCH_SUM not in mod["backward"].script()


def test_a_small_layer_is_measured_and_right(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(paper_layers, "LAYERS", (SMALL,))
    monkeypatch.setattr(
        paper_layers.roofline, "measure", lambda threads: paper_layers.roofline.Roofline(1e9, 1e9, threads, "numpy")
    )
    monkeypatch.setattr(sys, "argv", ["paper_layers.py", "--patches", "2,4", "--repeat", "1", "-o", str(tmp_path / "o.json")])
    assert paper_layers.main() == 0
    (found,) = json.loads((tmp_path / "o.json").read_text())
    assert [f["patch"] for f in found["filtered"]] == [2, 4]
    assert all(f["error"] < 1e-5 and f["ms"] > 0 and f["forward_ms"] > 0 for f in found["filtered"])
    assert found["exact_ms"] > 0
    assert "geometric mean" in capsys.readouterr().out


def test_departures_are_seen():
    data = paper_layers.Data.of(SMALL)
    gx, gw = paper_layers.compiled(SMALL, 2, data).backward()
    assert paper_layers.departure(2, data, (gx, gw)) < 1e-5
    assert paper_layers.departure(3, data, (gx, gw)) > 1e-2


def test_ratios_are_of_the_exact_time(capsys):
    results = [Measured(SMALL, "contiguous", exact, 0.5, (Filtered(2, 2.0, 2.0, 0.0),)) for exact in (8.0, 32.0)]
    assert paper_layers.geometric_means(results) == pytest.approx([8.0, 4.0])
    paper_layers.show(results, Console())
    assert "25.0%" in capsys.readouterr().out
