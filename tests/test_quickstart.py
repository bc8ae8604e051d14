"""`quickstart` with few epochs, and the commands that it recommends."""

from __future__ import annotations

import json
import shlex

import pytest
import torch

from tvmtrain import cli, quickstart


@pytest.fixture
def brief(monkeypatch):
    threads = torch.get_num_threads()
    # PyTorch's threads wait for each other actively: on a busy machine one of them is faster than two.
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    monkeypatch.setattr(quickstart, "PRETRAINING_EPOCHS", 4)
    monkeypatch.setattr(quickstart, "EPOCHS", 3)
    yield
    torch.set_num_threads(threads)


def test_quickstart_learns_the_new_domain_and_its_commands_work(brief, tmp_path, capsys):
    folder = tmp_path / "quick start"
    assert cli.main(["quickstart", "-o", str(folder), "--json"]) == 0
    out, messages = capsys.readouterr()
    result = json.loads(out)
    assert result["pretrained"] > 0.8
    assert result["before"] < 0.5
    assert result["compiled"]["accuracy"] > 0.8
    assert abs(result["compiled"]["loss"] - result["pytorch"]["loss"]) < 0.2
    assert min(result[side]["ms_per_step"] for side in ("compiled", "pytorch")) > 0
    assert "ms per step" in messages
    inspect, evaluate, train, verify = map(shlex.split, result["next"])
    assert cli.main(inspect[1:]) == 0
    capsys.readouterr()
    assert cli.main([*evaluate[1:], "--json"]) == 0
    score = json.loads(capsys.readouterr().out)
    assert (score["accuracy"], score["samples"]) == (result["compiled"]["accuracy"], 300)
    # The same batches, rates and order: the same accuracy.
    assert cli.main([*train[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == result["compiled"]["accuracy"]
    assert cli._parser().parse_args(verify[1:]).model == "tvmtrain.quickstart:network"


def test_quickstart_says_at_once_where_it_cannot_write(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["quickstart", "-o", str(tmp_path / "file" / "out")]) == 1
    assert "cannot make the folder" in capsys.readouterr().err


def test_the_images_are_those_of_the_data_set():
    images = quickstart.digits()
    assert images.x.shape == (1797, 16, 16, 1)
    assert sorted(set(images.y)) == list(range(10))
    assert images.x.max() == 255
    first, second = images.split(0.5)
    assert len(first.y) + len(second.y) == 1797
    assert (second.inverted().x == 255 - second.x).all()
