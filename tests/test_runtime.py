"""A running step: PyTorch's numbers, any number of samples outside training, and no input that can spoil its state."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import toy
import tvm
from machines import MACHINES
from torch.nn import functional
from tvm import relax

import tvmtrain
from tvmtrain import artifact, losses, runtime
from tvmtrain.artifact import LossSpec
from tvmtrain.errors import ArtifactError, CheckpointError, InputError, NonFiniteLossError

BATCH, FEATURES, CLASSES = toy.BATCH, toy.FEATURES, toy.CLASSES


def started(loss: str = "cross_entropy") -> runtime.TrainStep:
    return toy.artifact(loss).load()


@pytest.fixture
def step() -> runtime.TrainStep:
    return started()


def batch(seed: int = 0, count: int = BATCH) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.standard_normal((count, FEATURES)).astype("float32"), random.integers(0, CLASSES, count)


def everything(step: runtime.TrainStep) -> dict[str, bytes]:
    state = {name: tensor.numpy().tobytes() for name, tensor in step._moment.tensors.items()}
    return state | {"steps": str(step.steps).encode()}


def twin(step: runtime.TrainStep) -> torch.nn.Linear:
    """The same layer in PyTorch."""
    layer = torch.nn.Linear(FEATURES, CLASSES)
    state = step.state_dict()
    layer.load_state_dict({name: torch.from_numpy(state[f"fc.{name}"]) for name in ("weight", "bias")})
    return layer


# Training.


def test_a_batch_is_read_as_it_lies_or_copied_anew(step):
    """PyTorch's tensors begin where compiled code expects it; NumPy's arrays anywhere, here four bytes further on."""
    plain, moved = started(), np.empty(BATCH * FEATURES + 1, "float32")[1:].reshape(BATCH, FEATURES)
    for i in range(3):
        x, y = batch(i)
        kept = torch.from_numpy(x).clone()
        moved[...] = x
        losses = step(kept, torch.from_numpy(y).clone()), plain(moved, y)
        assert losses[0] == losses[1]
        assert torch.equal(kept, torch.from_numpy(x)), "a step writes nothing into a batch"
        moved[...] = 1e9
    assert everything(step) == everything(plain)
    whole, key = torch.zeros(BATCH, FEATURES).numpy(), ("input", "x")
    assert step.place.given(key, whole).data_ptr() == whole.ctypes.data, "as it lies"
    copy = step.place.given(key, moved).data_ptr()
    assert copy != moved.ctypes.data
    assert step.place.given(key, moved).data_ptr() == copy, "no new memory"
    frozen = batch(5)[0]
    frozen.flags.writeable = False
    assert step(frozen, y) == plain(frozen.copy(), y)


def test_steps_are_those_of_pytorch(step):
    layer = twin(step)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=toy.MOMENTUM)
    for i in range(10):
        x, y = batch(i)
        y[1] = toy.IGNORE if i == 3 else y[1]
        logits = layer(torch.from_numpy(x))
        expected = functional.cross_entropy(logits, torch.from_numpy(y))
        optimizer.zero_grad()
        expected.backward()
        gradients = step.gradients(x, y)
        np.testing.assert_allclose(gradients["fc.weight"], layer.weight.grad.numpy(), rtol=1e-5, atol=1e-6)
        optimizer.step()
        assert step(x, y) == pytest.approx(expected.item(), rel=1e-5)
        np.testing.assert_allclose(step.outputs[0], logits.detach().numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(step.state_dict()["fc.weight"], layer.weight.detach().numpy(), rtol=1e-5, atol=1e-6)
    assert step.steps == 10
    assert step.state_dict()["fc.seen"] == 10


def test_the_rate_is_the_optimizers_unless_given(step):
    other = started()
    x, y = batch()
    step(x, y)
    other(x, y, lr=0.1)
    assert everything(step) == everything(other)
    before = step.state_dict()["fc.weight"]
    step(x, y, lr=0)
    np.testing.assert_array_equal(step.state_dict()["fc.weight"], before)


@pytest.mark.parametrize(
    "give",
    [
        lambda x, y: (torch.from_numpy(x), torch.from_numpy(y)),
        lambda x, y: ((x,), [y]),
        lambda x, y: (x.astype("float64"), y.astype("uint8")),
        lambda x, y: (np.asfortranarray(x), y.tolist()),
        lambda x, y: (torch.from_numpy(x)[:, :], torch.from_numpy(y).int()),
        lambda x, y: (np.repeat(x, 2, axis=1)[:, ::2], y.astype(">i4")),
    ],
    ids=["torch", "wrapped", "cast", "layout", "views", "strides"],
)
def test_data_come_in_many_forms(step, give):
    x, y = batch()
    expected = started()(x, y)
    assert step(*give(x, y)) == expected


def test_steps_from_another_thread(step):
    x, y = batch()
    losses = []
    thread = threading.Thread(target=lambda: losses.append(step(x, y)))
    thread.start()
    thread.join()
    assert losses == [started()(x, y)]


# Prediction and evaluation.


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 11])
def test_predict_takes_any_number(step, count):
    x, _ = batch(count=count)
    expected = x @ step.state_dict()["fc.weight"].T + step.state_dict()["fc.bias"]
    np.testing.assert_allclose(step.predict(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 11])
def test_evaluate_is_exact_for_any_number(step, count):
    x, y = batch(count=count)
    y[count // 2 :: 3] = toy.IGNORE if count > 3 else y[count // 2 :: 3]
    logits = twin(step)(torch.from_numpy(x))
    before = everything(step)
    result = step.evaluate(x, y)
    assert result == pytest.approx(functional.cross_entropy(logits, torch.from_numpy(y)).item(), rel=1e-6)
    labels = y != toy.IGNORE
    assert result.accuracy == (logits.argmax(1).numpy() == y)[labels].mean()
    assert result.count == count
    assert everything(step) == before


def test_evaluate_mse_is_exact():
    step = started("mse")
    x, _ = batch(count=7)
    y = np.random.default_rng(1).standard_normal((7, CLASSES)).astype("float32")
    expected = functional.mse_loss(twin(step)(torch.from_numpy(x)), torch.from_numpy(y)).item()
    assert step.evaluate(x, y) == pytest.approx(expected, rel=1e-6)
    assert step.evaluate(x, y).accuracy is None


def test_evaluate_a_loss_of_the_users_own_needs_whole_batches():
    step = started("custom")
    x, _ = batch(count=8)
    y = np.random.default_rng(1).standard_normal((8, CLASSES)).astype("float32")
    expected = functional.mse_loss(twin(step)(torch.from_numpy(x)), torch.from_numpy(y)).item()
    assert step.evaluate(x, y) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(InputError, match="multiple of 4 samples"):
        step.evaluate(x[:7], y[:7])


def test_evaluate_where_no_label_counts(step):
    x, y = batch()
    result = step.evaluate(x, np.full_like(y, toy.IGNORE))
    assert np.isnan(result)
    assert result.accuracy is None


@pytest.mark.parametrize("ignore", [None, -100, 255])
def test_cross_entropy_of_dense_labels(ignore):
    random = np.random.default_rng(0)
    logits = (30 * random.standard_normal((3, 5, 4, 6))).astype("float32")
    labels = random.integers(0, 5, (3, 4, 6))
    if ignore is not None:
        labels[random.random(labels.shape) < 0.3] = ignore
    expected = functional.cross_entropy(
        torch.from_numpy(logits).double(), torch.from_numpy(labels), ignore_index=-100 if ignore is None else ignore
    )
    pieces = [losses.measure(LossSpec("cross_entropy", 5, ignore), logits[i : i + 2], labels[i : i + 2]) for i in (0, 2)]
    total = pieces[0] + pieces[1]
    assert total.loss / total.weight == pytest.approx(expected.item(), rel=1e-12)
    counts = labels != ignore if ignore is not None else labels >= 0
    assert total.right == ((logits.argmax(1) == labels) & counts).sum()
    assert total.labels == counts.sum()


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 2, 2)])
def test_cross_entropy_of_probabilities(shape):
    random = np.random.default_rng(0)
    logits, target = random.standard_normal((2, *shape))
    expected = functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(target))
    tally = losses.measure(LossSpec("cross_entropy"), logits, target)
    assert tally.loss / tally.weight == pytest.approx(expected.item(), rel=1e-12)


def test_bce_with_logits():
    random = np.random.default_rng(0)
    logits, target = 50 * random.standard_normal((4, 3)), random.random((4, 3))
    expected = functional.binary_cross_entropy_with_logits(torch.from_numpy(logits), torch.from_numpy(target))
    tally = losses.measure(LossSpec("bce_with_logits"), logits, target)
    assert tally.loss / tally.weight == pytest.approx(expected.item(), rel=1e-12)


# Bad input: a clear error, and everything is as it was.

X, Y = batch()


def with_value(array: np.ndarray, value: float) -> np.ndarray:
    changed = array.copy()
    changed.flat[-1] = value
    return changed


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X[:3], Y[:3], r"'x' has shape \(3, 6\); want \(4, 6\): training needs batches of exactly 4.*predict and evaluate"),
        (X, Y[:3], r"'y' has shape \(3,\); want \(4,\)"),
        (X[:, :5], Y, r"'x' has shape \(4, 5\); want \(4, 6\)$"),
        (X[0], Y, r"'x' has shape \(6,\)"),
        (X, Y[:, None], r"'y' has shape \(4, 1\)"),
        ((X, X), Y, "'x' has shape"),
        ((X * 9).astype("uint8"), Y, "dtype uint8; want float32; scale images first"),
        (X.astype("int64"), Y, "dtype int64; want float32; convert it"),
        (X.astype("complex64"), Y, "dtype complex64"),
        (X, Y.astype("float32"), "dtype float32; want int64; want class numbers"),
        (X, Y > 0, "dtype bool; want int64"),
        (X, with_value(Y.astype("uint64"), 2**63), "do not fit int64"),
        (X, with_value(Y, CLASSES), r"the label 3 at \(3,\); want 0..2, or -100 to be ignored"),
        (X, with_value(Y, -1), r"the label -1 at \(3,\)"),
        (with_value(X, np.nan), Y, r"'x' has 1 NaN or infinite values, the first nan at \(3, 5\)"),
        (with_value(X, -np.inf), Y, "-inf"),
        (with_value(X.astype("float64"), 1e300), Y, "infinite"),
        (torch.from_numpy(X).requires_grad_(), Y, r"cannot be read.*detach\(\)"),
        (torch.from_numpy(X).bfloat16(), Y, "bfloat16|cannot be read"),
        ([[1, 2], [3]], Y, "cannot be read"),
        ("text", Y, "dtype <U4"),
        (None, Y, "dtype object"),
        (X[:0], Y[:0], r"shape \(0, 6\)"),
    ],
)
def test_bad_data_change_nothing(step, x, y, message):
    step(X, Y)
    before = everything(step)
    with pytest.raises(InputError, match=message):
        step(x, y)
    assert everything(step) == before
    assert step(X, Y) > 0


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), -1, "fast", [0.1]])
def test_a_bad_rate_changes_nothing(step, lr):
    before = everything(step)
    with pytest.raises(InputError, match="lr is"):
        step(X, Y, lr=lr)
    assert everything(step) == before


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X[:0], Y[:0], "at least 1"),
        (X, Y[:2], "input 'x': 4, target 'y': 2"),
        (X[:, :2], Y, r"want \(N, 6\)"),
        (X, with_value(Y, 7), "label 7"),
        (with_value(X, np.nan), Y, "NaN"),
    ],
)
def test_bad_data_for_evaluation(step, x, y, message):
    with pytest.raises(InputError, match=message):
        step.evaluate(x, y)


def test_large_finite_values_are_no_infinities(step):
    assert step.predict(np.full((1, FEATURES), 1e38, "float32")).shape == (1, CLASSES)


def test_a_loss_that_is_not_finite_changes_nothing(step):
    step(X, Y)
    before, outputs = everything(step), step.outputs
    with pytest.raises(NonFiniteLossError, match=r"the loss of step 2 is (nan|inf); the state is that of step 1"):
        step(np.full((BATCH, FEATURES), 3e38, "float32"), Y)
    with pytest.raises(NonFiniteLossError, match="nan"):
        step(X, np.full_like(Y, toy.IGNORE))
    assert everything(step) == before
    np.testing.assert_array_equal(step.outputs[0], outputs[0])


def test_gradients_only_where_they_were_built(step):
    made = toy.artifact()
    entries = tuple(entry for entry in made.manifest.entries if entry.name != "gradients")
    manifest = dataclasses.replace(made.manifest, entries=entries, memory=toy.memory(entries))
    step = dataclasses.replace(made, manifest=manifest).load()
    with pytest.raises(ArtifactError, match="no gradients entry"):
        step.gradients(X, Y)


# State.


def test_weights_go_to_pytorch_and_back(step):
    step(X, Y)
    layer = twin(step)
    np.testing.assert_allclose(layer(torch.from_numpy(X)).detach().numpy(), step.predict(X), rtol=1e-5, atol=1e-6)
    other = torch.nn.Linear(FEATURES, CLASSES)
    state = {f"fc.{name}": value for name, value in other.state_dict().items()}
    kept = step.state_dict()
    before = everything(step)
    step.load_state_dict(
        state | {"fc.seen": torch.tensor(5), "fc.scale": kept["fc.scale"], "head.weight": other.weight.detach()}
    )
    np.testing.assert_allclose(step.predict(X), other(torch.from_numpy(X)).detach().numpy(), rtol=1e-5, atol=1e-6)
    assert step.state_dict()["fc.seen"] == 5
    unchanged = [name for name in before if name.startswith(("optimizer", "random", "steps"))]
    assert {name: everything(step)[name] for name in unchanged} == {name: before[name] for name in unchanged}


def test_state_dict_gives_copies(step):
    before = everything(step)
    for value in step.state_dict().values():
        value[...] = 7
    assert everything(step) == before


def test_one_of_two_tied_names_is_enough(step):
    state = step.state_dict()
    tied = state.pop("fc.weight") + 1
    step.load_state_dict(state | {"head.weight": tied})
    np.testing.assert_array_equal(step.state_dict()["fc.weight"], tied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("fc.bias"), "missing: 'fc.bias'; unexpected: none"),
        (lambda s: s.update({"fc.wieght": s["fc.weight"]}), r"unexpected: 'fc.wieght' \(near: fc.weight"),
        (lambda s: s.update({"optimizer:momentum:fc.bias": s["fc.bias"]}), "unexpected: 'optimizer"),
        (lambda s: s.update({"fc.bias": s["fc.bias"][:2]}), r"'fc.bias' has shape \(2,\); want \(3,\)"),
        (lambda s: s.update({"fc.bias": s["fc.bias"].astype(int)}), "'fc.bias' has dtype int64; want float32"),
        (lambda s: s.update({"fc.seen": np.float32(1)}), "'fc.seen' has dtype float32"),
        (lambda s: s.update({"head.weight": s["head.weight"] + 1}), "'head.weight' is tied to 'fc.weight'"),
        (lambda s: s.update({"fc.weight": torch.nn.Parameter(torch.zeros(3, 6))}), "detach"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(step, change, message):
    step(X, Y)
    before = everything(step)
    state = {name: value + 1 for name, value in step.state_dict().items()}
    change(state)
    with pytest.raises(InputError, match=message):
        step.load_state_dict(state)
    assert everything(step) == before


def test_going_on_from_a_checkpoint_gives_the_same_bits(tmp_path, step):
    for i in range(3):
        step(*batch(i))
    step.save(tmp_path / "now.safetensors")
    saved = everything(step)
    expected = [step(*batch(i)) for i in range(3, 8)]
    other = started()
    other.restore(tmp_path / "now.safetensors")
    assert everything(other) == saved
    assert [other(*batch(i)) for i in range(3, 8)] == expected
    assert everything(other) == everything(step)
    assert other.steps == 8


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path, step):
    step(X, Y)
    before = everything(step)
    path = tmp_path / "now.safetensors"
    step.save(path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    (tmp_path / "flipped").write_bytes(data)
    (tmp_path / "short").write_bytes(data[:100])
    folder = toy.artifact().save(tmp_path / "out")
    artifact.write_checkpoint(tmp_path / "foreign", {"fc.weight": np.zeros((2, 6), "float32")}, 1, "0")
    for name, message in [
        ("flipped", "digest"),
        ("short", "truncated or damaged"),
        ("missing", "cannot be read"),
        ("foreign", "does not fit this model: fc.bias is missing.* and 2 more"),
        (folder / "parameters.safetensors", "not written by TrainStep.save"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            step.restore(tmp_path / name)
        assert everything(step) == before


# Loading.


def test_an_artifact_runs_from_its_folder(tmp_path, step):
    loaded = tvmtrain.load(toy.artifact().save(tmp_path / "out"))
    assert [loaded(*batch(i)) for i in range(3)] == [step(*batch(i)) for i in range(3)]
    assert everything(loaded) == everything(step)


def test_another_artifact_in_the_same_folder_is_another_step(tmp_path):
    """The system's loader would go on with the first library: the path is the same."""
    y = np.zeros((BATCH, CLASSES), "float32")
    first = tvmtrain.load(toy.artifact("cross_entropy").save(tmp_path / "out"))
    second = tvmtrain.load(toy.artifact("mse").save(tmp_path / "out"))
    assert second(X, y) == pytest.approx(float(np.square(second.outputs[0]).mean()), rel=1e-5)
    assert first(X, Y) == started()(X, Y)


def test_a_library_that_is_none_is_refused(tmp_path):
    class NoCode:
        def export_library(self, file_name):
            with open(file_name, "wb") as file:
                file.write(b"\x7fELF, and no more")

    made = dataclasses.replace(toy.artifact(), executable=NoCode())
    with pytest.raises(ArtifactError, match=r"lib\.so cannot be loaded"):
        runtime.load(made.save(tmp_path / "out"))


def test_code_without_an_entry_is_refused():
    made = toy.artifact()
    entry = dataclasses.replace(made.manifest.entries[3], name="more")
    entries = (*made.manifest.entries, entry)
    manifest = dataclasses.replace(made.manifest, entries=entries, memory=toy.memory(entries))
    with pytest.raises(ArtifactError, match=r"cannot be started.*more"):
        dataclasses.replace(made, manifest=manifest).load()


def test_an_artifact_for_another_processor_is_refused():
    made = toy.artifact()
    manifest = dataclasses.replace(made.manifest, device={"name": "board", "arch": "riscv64"})
    with pytest.raises(ArtifactError, match="riscv64"):
        dataclasses.replace(made, manifest=manifest).load()


DEVICE = """
import json, os, sys
import numpy as np
from tvmtrain import runtime
step = runtime.load(sys.argv[1])
x, y = np.load(sys.argv[2]).values()
losses = [step(x, y) for _ in range(3)]
step.save(sys.argv[1] + "/now.safetensors")
step.restore(sys.argv[1] + "/now.safetensors")
heavy = ("torch", "onnx", "xgboost", "tvm.relax", "tvm.s_tir")
foreign = [name for name in sys.modules if name.startswith(heavy)]
ours = sorted(name for name in sys.modules if name.startswith("tvmtrain"))
print(json.dumps({"losses": losses, "evaluation": step.evaluate(x, y), "foreign": foreign, "ours": ours}))
"""


def on_a_device(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)} | environment
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=variables, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result


def test_the_runtime_needs_neither_pytorch_nor_the_compiler(tmp_path, step):
    folder = toy.artifact().save(tmp_path / "out")
    np.savez(tmp_path / "data.npz", x=X, y=Y)
    result = on_a_device(DEVICE, str(folder), str(tmp_path / "data.npz"), TVM_USE_RUNTIME_LIB="1")
    report = json.loads(result.stdout)
    assert report["losses"] == [step(X, Y) for _ in range(3)]
    assert report["evaluation"] == step.evaluate(X, Y)
    assert report["foreign"] == []
    ours = ("artifact", "batches", "checks", "costs", "errors", "features", "gpu_code", "losses", "runtime", "selection")
    assert report["ours"] == ["tvmtrain", *(f"tvmtrain.{name}" for name in ours)]
    assert result.stderr == ""


def test_the_package_itself_imports_nothing():
    script = "import sys, tvmtrain; dir(tvmtrain); print([m for m in ('tvm', 'torch', 'numpy') if m in sys.modules])"
    assert on_a_device(script).stdout.strip() == "[]"


def test_pytorch_can_be_imported_afterwards():
    script = "import tvmtrain.runtime, torch; import tvm; print(torch.ones(2).sum().item())"
    assert on_a_device(script, TVM_USE_RUNTIME_LIB="1").stdout.strip() == "2.0"


# Threads.

THREADS = """
import os, threading
before = os.sched_getaffinity(0)
from tvmtrain import runtime
runtime.use_threads({count})
get_global_func = runtime.get_global_func
counts = [get_global_func("runtime.NumThreads")()]
def other():
    runtime.use_threads({count})
    counts.append(get_global_func("runtime.NumThreads")())
thread = threading.Thread(target=other)
thread.start()
thread.join()
assert os.sched_getaffinity(0) == before, (os.sched_getaffinity(0), before)
print(counts)
"""


def test_every_physical_core_unless_told_otherwise():
    cores = runtime.physical_cores()
    assert 1 <= cores <= os.cpu_count()
    script = THREADS.format(count="runtime.default_threads()")
    for asked, counts in (("", [cores, cores]), ("3", [3, 3])):
        assert on_a_device(script, TVM_NUM_THREADS=asked, TVM_USE_RUNTIME_LIB="1").stdout.strip() == str(counts)
    assert on_a_device(THREADS.format(count=1), TVM_USE_RUNTIME_LIB="1").stdout.strip() == "[1, 1]"


def test_a_pool_that_cannot_grow_is_told():
    script = """
from tvmtrain import runtime
runtime.get_global_func("runtime.NumThreads")()
runtime.use_threads(4)
"""
    assert "TVM_NUM_THREADS=4" in on_a_device(script, TVM_NUM_THREADS="1", TVM_USE_RUNTIME_LIB="1").stderr


def test_zero_threads_are_refused():
    made = toy.artifact()
    with pytest.raises(InputError, match="threads is 0"):
        runtime.here(made.executable.jit(), made.manifest, threads=0)


# Cost.


@functools.cache
def many(count: int) -> runtime.TrainStep:
    """A step whose state are ``count`` tensors, of which it changes none."""
    specs = tuple(artifact.TensorSpec("parameter", f"p{i}", (4,), "float32") for i in range(count))
    scalar = artifact.TensorSpec("rate", "lr", (), "float32")
    builder = relax.BlockBuilder()
    variables = [relax.Var(f"v{i}", relax.TensorType(s.shape, s.dtype)) for i, s in enumerate((scalar, *specs))]
    with builder.function("train_step", variables):
        with builder.dataflow():
            result = builder.emit_output(relax.Tuple([relax.op.add(variables[0], variables[0]), *variables[1:]]))
        builder.emit_func_output(result)
    for name, result in (("predict", []), ("loss", [relax.const(1.0, "float32")])):
        with builder.function(name, []):
            with builder.dataflow():
                output = builder.emit_output(relax.Tuple(result))
            builder.emit_func_output(output)
    loss = artifact.TensorSpec("loss", "loss", (), "float32")
    entries = (
        artifact.Entry("train_step", (scalar, *specs), (loss, *specs)),
        artifact.Entry("predict", (), ()),
        artifact.Entry("loss", (), (loss,)),
    )
    manifest = dataclasses.replace(
        toy.manifest("mse"),
        entries=entries,
        memory=toy.memory(entries),
        aliases={},
        trained=(),
        unread=(),
        loss=LossSpec("custom"),
        plan=None,
    )
    executable = tvm.compile(builder.finalize(), target=tvm.target.Target({"kind": "llvm"}))
    return artifact.Artifact(manifest, {s.name: np.zeros(4, "float32") for s in specs}, executable).load()


def test_five_hundred_tensors_cost_little():
    step = many(500)
    best = min(timed(step) for _ in range(20))
    assert best < 0.01, f"{1e6 * best:.0f} microseconds for a step that does nothing"


def timed(step: runtime.TrainStep) -> float:
    start = time.perf_counter()
    step((), ())
    return time.perf_counter() - start


@pytest.mark.parametrize("case", MACHINES, ids=lambda case: case.name)
def test_memory_is_that_of_the_machine_or_of_its_container(case, tmp_path):
    assert runtime.memory(str(case.write(tmp_path))) == runtime.Memory(case.total, case.available)
