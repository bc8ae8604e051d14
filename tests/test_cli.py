"""Every command as a user types it: results, --json, exit codes and messages; interrupted runs go on with the same bits."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import tvmtrain as tt
from tvmtrain import artifact, cli, console, data, runtime, toolchain, training
from tvmtrain.errors import InputError

NETWORK = textwrap.dedent("""
    import torch
    from torch import nn

    def small():
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU6(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(64, 3)
        )

    def with_example():
        return small(), torch.randn(4, 1, 8, 8)

    def with_batch():
        return small(), torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])

    def dense():
        return nn.Conv2d(1, 3, 1), torch.randn(4, 1, 8, 8)

    def words():
        return nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(24, 2))

    def wrong():
        return 5

    def in_a_pair():
        model, x, y = with_batch()
        return model, (x, y)

    def failing():
        raise KeyError("weights.bin")
""")


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """network.py, a compiled step in out/, data.npz."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "network.py").write_text(NETWORK)
    rng = np.random.default_rng(0)
    y, y_test = rng.integers(0, 3, 42), rng.integers(0, 3, 15)
    x, x_test = (rng.integers(0, 80, (len(t), 8, 8, 1)) + 80 * t[:, None, None, None] for t in (y, y_test))
    np.savez(folder / "data.npz", x=x.astype("uint8"), y=y, x_test=x_test.astype("uint8"), y_test=y_test)
    options = ("--lr", "0.05", "--momentum", "0.9", "--seed", "3", "--gradients")
    assert cli.main(["compile", f"{folder}/network.py:with_example", "-o", f"{folder}/out", *options]) == 0
    return folder


@pytest.fixture
def at(folder, monkeypatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def outcome(capsys, *words: object) -> tuple[int, dict, str]:
    """(exit code, JSON document, messages) of a command with --json."""
    capsys.readouterr()
    code = cli.main([*map(str, words), "--json"])
    out, messages = capsys.readouterr()
    return code, json.loads(out) if out else {}, messages


def same_state(one: Path, other: Path) -> bool:
    """Two checkpoints with the same bits: their digests are over the number of steps and every tensor."""
    digests = [artifact._facts(path.read_bytes())["digest"] for path in (one, other)]
    return digests[0] == digests[1]


def refused(capsys, *words: object) -> str:
    """The one message of a command that ends with exit code 1."""
    capsys.readouterr()
    assert cli.main([*map(str, words)]) == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def misused(capsys, *words: object) -> str:
    with pytest.raises(SystemExit) as raised:
        cli.main([*map(str, words)])
    assert raised.value.code == 2
    return capsys.readouterr().err


# compile


def test_compile_says_what_it_built(at, capsys, tmp_path):
    code, result, messages = outcome(
        capsys,
        "compile",
        "network:with_batch",
        "-o",
        tmp_path / "out",
        "--optimizer",
        "adam",
        "--weight-decay",
        "0.1",
        "--eval",
        "--batch",
        6,
    )
    assert code == 0
    assert result["inputs"] == {"x": "6x1x8x8 float32", "y": "6 int64"}
    assert result["optimizer"] == {
        "kind": "adam",
        "lr": 0.001,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.1,
        "clip_norm": None,
    }
    assert (result["parameters"], result["trained"]) == (243, 243)
    assert set(result["seconds"]) == {"load", "trace", "build", "save"}
    assert "compiling for host" in messages
    # In evaluation mode nothing is drawn and running statistics stay.
    state = runtime.load(tmp_path / "out").manifest
    assert "random:state" not in state.state


def test_compile_for_a_board_goes_on_with_deploy(at, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(artifact, "machine", lambda: "riscv64")
    _, result, messages = outcome(capsys, "compile", "network:with_example", "-o", tmp_path / "pi")
    assert result["runs_here"] is False
    assert f"next: tvmtrain deploy {tmp_path}/pi --device host --data DATA.npz -o host.tar.gz" in messages


def test_devices_are_looked_at_before_the_model(at, capsys, monkeypatch, tmp_path):
    words = ("compile", "network:failing", "-o", tmp_path / "out", "--device")
    assert "no device named 'raspbery-pi-4b': did you mean raspberry-pi" in refused(capsys, *words, "raspbery-pi-4b")
    monkeypatch.setattr(toolchain, "installed", lambda _: iter(()))
    message = refused(capsys, *words, "jetson-orin-nano-cpu")
    assert "nothing here links code for aarch64-linux-gnu: install g++-aarch64-linux-gnu" in message


def test_compile_with_shapes_and_a_plan(at, capsys, tmp_path):
    plan = tmp_path / "plan.toml"
    plan.write_text('[layers."5"]\nweight = 1.0\n')
    code, result, _ = outcome(
        capsys,
        "compile",
        "network.py:small",
        "--x",
        "2x1x8x8",
        "--loss",
        "cross_entropy",
        "--plan",
        plan,
        "-o",
        tmp_path / "out",
    )
    assert (code, result["trained"]) == (0, 195)
    assert (tmp_path / "out" / "plan.toml").exists()


def test_compile_dense_outputs_and_whole_numbers(at, capsys, tmp_path):
    _, result, _ = outcome(capsys, "compile", "network:dense", "-o", tmp_path / "dense")
    assert result["inputs"]["y"] == "4x8x8 int64"
    _, result, _ = outcome(capsys, "compile", "network:words", "--x", "2,6,int64", "--loss", "mse", "-o", tmp_path / "words")
    assert result["inputs"] == {"x": "2x6 int64", "y": "2x2 float32"}


def test_compile_an_exported_program_takes_its_own_shapes(at, capsys, tmp_path):
    program = torch.export.export(torch.nn.Linear(4, 2), (torch.randn(3, 4),))
    torch.export.save(program, tmp_path / "m.pt2")
    _, result, _ = outcome(capsys, "compile", tmp_path / "m.pt2", "--loss", "bce_with_logits", "-o", tmp_path / "out")
    assert result["inputs"] == {"x": "3x4 float32", "y": "3x2 float32"}
    assert "keeps the mode" in refused(capsys, "compile", tmp_path / "m.pt2", "--train", "-o", tmp_path / "out")


def test_compile_an_onnx_file_takes_its_own_shapes(at, capsys, tmp_path):
    from onnx import TensorProto, helper, numpy_helper, save_model

    x, y = (
        helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in (("x", ["batch", 4]), ("y", ["batch", 2]))
    )
    weight = numpy_helper.from_array(np.ones((4, 2), "float32"), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), str(tmp_path / "m.onnx"))
    _, result, _ = outcome(capsys, "compile", tmp_path / "m.onnx", "--batch", 5, "--loss", "mse", "-o", tmp_path / "out")
    assert result["inputs"]["x"] == "5x4 float32"


def test_models_that_cannot_be_compiled(at, capsys, tmp_path):
    place = ("-o", tmp_path / "never")
    for model, message in {
        "nonsense": "want package.module:factory",
        "network:nothing": "no function 'nothing'",
        "network:wrong": "returned int; want an nn.Module",
        "network:failing": r"failing\(\) failed: KeyError: 'weights.bin'",
        "network:small": "add --x",
        "network:in_a_pair": r"cannot take an example of shape 4x1x8x8, 4: .*; a factory returns model, x, y: three values, not",
        "nowhere:small": "cannot be imported: ModuleNotFoundError",
        "nowhere.py:small": "no such file",
        "nowhere.pt2": "no such file",
        "nowhere.onnx": "no such file",
    }.items():
        assert re.search(message, refused(capsys, "compile", model, *place)), model
    assert "cannot take an example of shape 4x3x8x8" in refused(capsys, "compile", "network:small", "--x", "4x3x8x8", *place)
    assert "no device named 'toaster'" in refused(capsys, "compile", "network:with_example", "--device", "toaster", *place)
    plan = ("compile", "network:with_example", "--plan", "nowhere.toml", *place)
    assert "nowhere.toml" in refused(capsys, *plan)
    assert not (tmp_path / "never").exists()


def test_options_that_make_no_sense(at, capsys):
    place = ("compile", "network:with_example", "-o", "never")
    assert "--momentum: not an option of --optimizer adam" in misused(
        capsys, *place, "--optimizer", "adam", "--momentum", "0.9"
    )
    assert "nesterov=True needs momentum" in misused(capsys, *place, "--nesterov")
    assert "wanted sizes with the batch first" in misused(capsys, *place, "--x", "large")
    assert "not allowed with" in misused(capsys, *place, "--train", "--eval")
    assert "invalid choice: 'tuna'" in misused(capsys, "tuna")
    assert "wanted numbers with commas" in misused(capsys, "run", "out", "--data", "d.npz", "--mean", "a,b")
    assert "x=images" in misused(capsys, "run", "out", "--data", "d.npz", "--keys", "x")
    assert "wanted 1 or more" in misused(capsys, "run", "out", "--data", "d.npz", "--epochs", "0")


# run


def test_run_trains_evaluates_and_saves(at, capsys, tmp_path):
    words = ("run", "out", "--data", "data.npz", "--epochs", 15, "--shuffle", "--schedule", "cosine", "--warmup", 3)
    saved, weights = tmp_path / "now.safetensors", tmp_path / "weights.safetensors"
    code, result, messages = outcome(capsys, *words, "--save", saved, "--weights", weights)
    assert code == 0
    assert [epoch["epoch"] for epoch in result["epochs"]] == list(range(1, 16))
    assert (result["steps"], result["samples"]) == (150, 600)
    assert result["evaluation"]["count"] == 15
    assert result["accuracy"] == result["evaluation"]["accuracy"] > 0.8
    assert result["ms_per_step"] > 0
    assert messages.count("2 of 42 samples are left out of every epoch") == 1
    assert re.search(r"epoch 15/15  loss \d\.\d+  accuracy .*evaluation loss", messages)

    code, again, _ = outcome(capsys, "run", "out", "--data", "data.npz", "--eval", "--resume", saved)
    assert (code, again) == (0, {"steps": 150, "loss": result["loss"], "accuracy": result["accuracy"], "samples": 15})
    step = tt.load("out")
    step.restore(saved)
    for name, value in safetensors.torch.load_file(weights).items():
        np.testing.assert_array_equal(value.numpy(), step.state_dict()[name])


def test_run_is_the_loop_that_its_documentation_says(at, capsys, tmp_path):
    words = (
        "run",
        "out",
        "--data",
        "data.npz",
        "--epochs",
        3,
        "--shuffle",
        "--seed",
        7,
        "--lr",
        0.1,
        "--schedule",
        "step",
        "--gamma",
        0.5,
    )
    outcome(capsys, *words, "--save", tmp_path / "a.safetensors")
    step, stored = tt.load("out"), np.load("data.npz")
    for epoch in range(3):
        rows = np.random.Generator(np.random.PCG64([7, epoch])).permutation(42)
        for i in range(10):
            batch = rows[4 * i : 4 * i + 4]
            step(
                stored["x"][batch].transpose(0, 3, 1, 2).astype("float32") / np.float32(255),
                stored["y"][batch],
                lr=0.1 * 0.5**epoch,
            )
    step.save(tmp_path / "b.safetensors")
    assert same_state(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def test_the_learning_rate_of_each_schedule():
    cosine = training.Rate(1.0, "cosine", warmup=2)
    assert [round(cosine.at(i, 5, 2), 4) for i in (0, 1, 2, 6, 9)] == [0.5, 1.0, 1.0, 0.5, 0.0381]
    assert [training.Rate(1.0, "step", step_size=2).at(i, 1, 5) for i in range(5)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert training.Rate(0.3).at(99, 1, 1) == 0.3
    with pytest.raises(InputError, match="want one of constant, cosine, step"):
        training.Rate(0.1, "linear")


def test_run_goes_on_in_the_middle_of_an_epoch(at, capsys, tmp_path):
    words = ("run", "out", "--data", "data.npz", "--epochs", 3, "--shuffle", "--schedule", "cosine")
    outcome(capsys, *words, "--save", tmp_path / "whole.safetensors")
    step, samples = tt.load("out"), read_data()
    rate = training.Rate(0.05, "cosine")
    for i in range(13):  # the second epoch has begun
        rows = training.order(42, i // 10, 0, True)[4 * (i % 10) : 4 * (i % 10) + 4]
        step(*samples.train.batch(rows), lr=rate.at(i, 10, 3))
    step.save(tmp_path / "part.safetensors")
    part = tmp_path / "part.safetensors"
    _, result, messages = outcome(capsys, *words, "--resume", part, "--save", part)
    assert [(epoch["epoch"], epoch["steps"]) for epoch in result["epochs"]] == [(2, 7), (3, 10)]
    assert "resumed after step 13" in messages
    assert same_state(part, tmp_path / "whole.safetensors")
    _, result, messages = outcome(capsys, *words, "--resume", part)
    assert result["epochs"] == []
    assert result["evaluation"]["count"] == 15
    assert "all 3 epochs are done" in messages


def read_data():
    return data.load("data.npz", tt.load("out").manifest)


def test_run_saves_every_few_steps(at, capsys, tmp_path, monkeypatch):
    saves = []
    monkeypatch.setattr(runtime.TrainStep, "save", lambda self, path: saves.append(self.steps))
    outcome(capsys, "run", "out", "--data", "data.npz", "--epochs", 2, "--save", tmp_path / "x", "--save-every", 4)
    assert saves == [4, 8, 10, 12, 16, 20, 20]


def test_ctrl_c_saves_and_the_run_goes_on_with_the_same_bits(at, tmp_path):
    big, rng = tmp_path / "big.npz", np.random.default_rng(1)
    np.savez(big, x=rng.random((8000, 1, 8, 8), dtype="float32"), y=rng.integers(0, 3, 8000))
    shutil.copytree("out", tmp_path / "out")
    command = [
        sys.executable,
        "-m",
        "tvmtrain",
        "run",
        str(tmp_path / "out"),
        "--data",
        str(big),
        "--epochs",
        "2",
        "--shuffle",
        "--json",
    ]
    whole = subprocess.run([*command, "--save", str(tmp_path / "whole")], capture_output=True, text=True, check=True)
    assert json.loads(whole.stdout)["steps"] == 4000

    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = running.stderr.readline()
    assert "8000 samples to train on" in first
    time.sleep(0.4)
    running.send_signal(signal.SIGINT)
    out, messages = running.communicate(timeout=60)
    assert running.returncode == 130
    result = json.loads(out)
    assert result["interrupted"]
    assert 0 < result["steps"] < 4000
    assert result["saved"] == str(tmp_path / "out" / "interrupted.safetensors")
    go_on = re.search(r"go on with: tvmtrain (run .*)", messages).group(1)
    assert go_on.endswith(f"--resume {result['saved']}")

    resumed = [sys.executable, "-m", "tvmtrain", *go_on.split(), "--save", str(tmp_path / "parts")]
    subprocess.run(resumed, capture_output=True, check=True)
    assert same_state(tmp_path / "parts", tmp_path / "whole")


def test_the_command_to_go_on_replaces_an_older_resume():
    options = cli._parser().parse_args(["run", "out", "--data", "d"])
    options.argv = ["run", "my out", "--resume", "old", "--data", "d", "--resume=older"]
    assert cli._resume_command(options, "new") == "tvmtrain run 'my out' --data d --resume new"


def test_run_on_other_evaluation_data_and_few_samples(at, capsys):
    code, result, _ = outcome(capsys, "run", "out", "--data", "data.npz", "--eval-data", "data.npz", "--limit", 9)
    assert (code, result["samples"], result["evaluation"]["count"]) == (0, 8, 9)


def test_run_says_what_becomes_of_images(at, capsys, tmp_path):
    np.savez(tmp_path / "wide.npz", x=np.zeros((8, 16, 16, 1), "uint8"), y=np.zeros(8, int))
    code, _, messages = outcome(capsys, "run", "out", "--data", tmp_path / "wide.npz")
    assert code == 0
    assert "wide.npz: x: channels last (16x16x1) turned into channels first (1x16x16)\n" in messages
    assert "wide.npz: x: 16x16 resized to 8x8\n" in messages


def test_runs_that_cannot_start(at, capsys, tmp_path):
    run = ("run", "out", "--data")
    assert "no such file or folder" in refused(capsys, *run, "nowhere.npz")
    assert "the file is missing" in refused(capsys, "run", "nowhere", "--data", "data.npz")
    assert "2 samples to train on, and the step was compiled for 4" in refused(capsys, *run, "data.npz", "--limit", 2)
    assert "checkpoint" in refused(capsys, *run, "data.npz", "--resume", "nothing.safetensors")
    assert "mean has 2 numbers" in refused(capsys, *run, "data.npz", "--mean", "1,2")
    np.savez(tmp_path / "test.npz", x_test=np.zeros((5, 1, 8, 8), "float32"), y_test=np.zeros(5, int))
    assert "test samples only; add --eval" in refused(capsys, *run, tmp_path / "test.npz")
    np.savez(tmp_path / "labels.npz", x=np.zeros((5, 1, 8, 8), "float32"), y=np.full(5, 9))
    assert "labels.npz: target 'y' has the label 9 in sample 0" in refused(capsys, *run, tmp_path / "labels.npz")
    assert "cannot write" in refused(capsys, *run, "data.npz", "--save", tmp_path / "no" / "folder")


def test_a_run_that_diverges_says_so(at, capsys):
    assert (
        "lower the learning rate" in refused(capsys, "run", "out", "--data", "data.npz", "--epochs", 9, "--lr", "1e38").lower()
    )


def test_run_and_inspect_need_neither_pytorch_nor_the_compiler_nor_rich(at):
    program = textwrap.dedent("""
        import sys
        for name in ("torch", "rich", "PIL", "onnx", "sklearn"):
            sys.modules[name] = None
        from tvmtrain import cli
        code = cli.main(["run", "out", "--data", "data.npz"]) or cli.main(["inspect", "out"]) or cli.main(["devices"])
        assert "tvm.relax" not in sys.modules
        assert cli.main(["compile", "network:small", "-o", "never"]) == 1
        sys.exit(code)
    """)
    environment = os.environ | {"TVM_USE_RUNTIME_LIB": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "epoch 1/1  loss" in done.stdout
    assert "train_step" in done.stdout
    assert "this command needs torch: pip install 'tvmtrain[compile]'" in done.stderr


# inspect, devices, messages


def test_inspect_shows_an_artifact(at, capsys):
    code, result, messages = outcome(capsys, "inspect", "out")
    assert code == 0
    assert list(result["entries"]) == ["gradients", "loss", "predict", "train_step"]
    assert (
        result["entries"]["predict"]["inputs"] == ["x 4x1x8x8 float32", "4 parameter", "2 buffer"] or len(result["layers"]) == 3
    )
    assert (result["parameters"], result["trained"], result["batch"]) == (243, 243, 4)
    assert result["optimizer"]["momentum"] == 0.9
    assert {"lib.so", "manifest.json", "parameters.safetensors"} <= set(result["files"])
    assert "243, 243 trained" in messages


@pytest.fixture(scope="session")
def head(folder) -> Path:
    """The same step, but for a plan that trains the linear layer alone."""
    (folder / "head.toml").write_text('[layers."5"]\nweight = 1.0\n')
    words = ("--plan", f"{folder}/head.toml", "--lr", "0.05", "--momentum", "0.9", "--seed", "3")
    assert cli.main(["compile", f"{folder}/network.py:with_example", "-o", f"{folder}/head", *words]) == 0
    return folder / "head"


def test_inspect_tells_what_each_layer_trains_keeps_and_spends(at, head, capsys):
    _, result, messages = outcome(capsys, "inspect", "out")
    costs = {cost["name"]: cost for cost in result["costs"]}
    assert {name: cost["trained"] for name, cost in costs.items()} == {"0": 40, "1": 8, "5": 195}
    # The linear layer keeps its input, 4 rows of 64 numbers; the first layer's is the caller's.
    assert (costs["5"]["kept"], costs["0"]["kept"]) == (4 * 64 * 4, 0)
    step = result["memory"]["entries"]["train_step"]
    assert max(map(sum, zip(*(result["memory"]["timeline"][k] for k in ARENA_KINDS), strict=True))) == step["lower_bound"]
    assert result["state"]["parameter"] == 243 * 4 == result["state"]["optimizer"]
    assert re.search(r"^5 +linear +195 +1.0 KiB +0.00 MFLOP$", messages, re.MULTILINE)
    _, other, messages = outcome(capsys, "inspect", "head")
    assert {cost["name"]: cost["trained"] for cost in other["costs"] if cost["trained"]} == {"5": 195}
    assert other["memory"]["entries"]["train_step"]["arena"] < step["arena"]
    assert re.search(r"^all +195 +1.0 KiB", messages, re.MULTILINE)


ARENA_KINDS = ("features", "masks", "gradients", "temporary", "workspace")


def test_inspect_draws_memory(at, head, capsys, tmp_path):
    picture = tmp_path / "memory.svg"
    code, result, messages = outcome(capsys, "inspect", "head", "--plot", picture, "--against", "out")
    assert code == 0
    assert f"live bytes over a training step: {picture}" in messages
    words = {"".join(e.itertext()).strip() for e in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text")}
    peak = result["memory"]["entries"]["train_step"]["lower_bound"] / 1024
    assert {"before: out", "after: head", "forward", "saved features"} <= words
    assert any(text.startswith(f"train_step: peak {peak:,.0f} KB in the arena") for text in words)
    outcome(capsys, "inspect", "head", "--plot", tmp_path / "memory.PNG")
    assert (tmp_path / "memory.PNG").read_bytes().startswith(b"\x89PNG")


def test_plots_that_cannot_be_drawn(at, capsys, tmp_path, monkeypatch):
    assert "--against: needs --plot FILE" in misused(capsys, "inspect", "out", "--against", "out")
    assert "got the suffix '.jpg', wanted .svg, .png, .pdf" in refused(capsys, "inspect", "out", "--plot", tmp_path / "m.jpg")
    assert "make its folder first" in refused(capsys, "inspect", "out", "--plot", tmp_path / "no" / "m.svg")
    assert "the file is missing" in refused(capsys, "inspect", "out", "--plot", tmp_path / "m.svg", "--against", "nowhere")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'tvmtrain[plot]'" in refused(capsys, "inspect", "out", "--plot", tmp_path / "m.svg")
    assert not list(tmp_path.iterdir())


def test_compile_tells_what_a_step_costs(at, head, capsys, tmp_path):
    words = ("compile", "network:with_example", "--plan", "head.toml", "--summary", "-o", tmp_path / "out")
    code, result, messages = outcome(capsys, *words)
    assert code == 0
    before, after = result["summary"]["against"], result["summary"]
    assert (sum(c["trained"] for c in before["layers"]), sum(c["trained"] for c in after["layers"])) == (243, 195)
    assert result["memory"]["arena"] == after["arena"] < before["arena"]
    assert result["backward_flops"] == sum(c["flops"] for c in after["layers"])
    assert re.search(r"before +after +ratio", messages)
    assert f"tvmtrain inspect {tmp_path}/out --plot memory.svg" in messages


def test_inspect_an_artifact_of_another_machine(at, capsys, tmp_path):
    foreign = tt.load("out").manifest
    shutil.copytree("out", tmp_path / "out")
    described = artifact.Manifest.from_dict(
        json.loads(json.dumps(foreign.to_dict())) | {"device": {"name": "board", "arch": "riscv64"}}
    )
    files = {name: (tmp_path / "out" / name).read_bytes() for name in (artifact.LIBRARY, artifact.PARAMETERS)}
    zeros = json.loads((tmp_path / "out" / artifact.MANIFEST).read_text())["zeros"]
    (tmp_path / "out" / artifact.MANIFEST).write_bytes(artifact._manifest_bytes(described, files, zeros))
    code, result, messages = outcome(capsys, "inspect", tmp_path / "out")
    assert (code, result["runs_here"]) == (0, False)
    assert "not this machine" in messages
    message = refused(capsys, "run", tmp_path / "out", "--data", "data.npz")
    assert "compiled for riscv64" in message
    assert "build it for this machine: tvmtrain compile MODEL -o FOLDER" in message


def test_inspect_refuses_what_is_damaged(at, capsys, tmp_path):
    shutil.copytree("out", tmp_path / "out")
    (tmp_path / "out" / "lib.so").write_bytes(b"")
    assert "lib.so" in refused(capsys, "inspect", tmp_path / "out")


def test_devices_are_listed(capsys):
    code, result, _ = outcome(capsys, "devices")
    assert code == 0
    assert result[0]["name"] == "host" or result[0]["buildable"]
    assert {"host", "x86-64-v3"} <= {device["name"] for device in result}


def test_a_traceback_is_for_those_who_ask(at, capsys, monkeypatch):
    monkeypatch.setattr(training, "fit", lambda *_: 1 / 0)
    message = refused(capsys, "run", "out", "--data", "data.npz")
    assert "unexpected ZeroDivisionError: division by zero (TVMTRAIN_DEBUG=1 shows where)" in message
    monkeypatch.setenv("TVMTRAIN_DEBUG", "1")
    assert cli.main(["run", "out", "--data", "data.npz"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_output_into_a_closed_pipe_is_no_error(at):
    command = f"{sys.executable} -m tvmtrain inspect out | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("out\n", "")


def test_a_plain_log_tells_how_far_a_long_epoch_is(monkeypatch, capsys):
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)
    with console.Console().progress("epoch 1/1", 3) as bar:
        bar.advance(2, "loss 1.0")
    assert capsys.readouterr().out == "epoch 1/1  2/3  loss 1.0\n"
