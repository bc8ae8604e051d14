"""The format on disk: what is written comes back, what is damaged is refused by name, a kill or a full disk loses nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from tvmtrain import artifact
from tvmtrain.artifact import Artifact, Manifest, TensorSpec
from tvmtrain.errors import ArtifactError, CheckpointError, DeviceError, StorageError

fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclasses.dataclass(frozen=True)
class Code:
    """Native code that nobody runs."""

    content: bytes = b"code"

    def export_library(self, file_name: str) -> None:
        Path(file_name).write_bytes(self.content)

    def jit(self) -> None:
        raise NotImplementedError


def fake(seed: int = 0, **changes) -> Artifact:
    return Artifact(dataclasses.replace(toy.manifest(), **changes), toy.state(seed), Code(f"code {seed}".encode()))


@pytest.fixture
def folder(tmp_path):
    return fake().save(tmp_path / "out")


def assert_holds(folder: Path, seed: int) -> None:
    stored = artifact.read(folder)
    assert stored.library.read_bytes() == f"code {seed}".encode()
    same_tensors(stored.state, toy.state(seed))


def same_tensors(got, wanted) -> None:
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_array_equal(got[name], value)
        assert got[name].dtype == value.dtype


def edit(folder: Path, change, *, sign: bool = True) -> None:
    """Change the JSON of the manifest in place; with ``sign`` as a program would, without as a careless hand."""
    path = folder / artifact.MANIFEST
    content = json.loads(path.read_text())
    change(content)
    if sign:
        del content["digest"]
        content["digest"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content))


def reshape(content, name: str, shape: list[int]) -> None:
    """Another shape of a tensor wherever it is told."""
    for entry in content["entries"]:
        for spec in (*entry["inputs"], *entry["outputs"]):
            if spec["name"] == name:
                spec["shape"] = shape


def step_memory(content) -> dict:
    return content["memory"]["entries"]["train_step"]


# Round trips.


def test_everything_comes_back(folder):
    stored = artifact.read(folder)
    assert stored.manifest == toy.manifest()
    assert_holds(folder, 0)
    assert sorted(os.listdir(folder)) == ["lib.so", "manifest.json", "parameters.safetensors", "plan.toml"]
    assert (folder / "plan.toml").read_text() == toy.manifest().plan


def zeros_of(folder: Path) -> set[str]:
    return set(json.loads((folder / artifact.MANIFEST).read_text())["zeros"])


def test_state_that_starts_as_zeros_is_named_and_not_stored(folder):
    """But for that of the model: whoever opens the file finds all weights and buffers, zeros or not."""
    model = {spec.name for spec in (toy.WEIGHT, toy.BIAS, toy.SEEN, toy.UNREAD)}
    assert not toy.state()["fc.seen"].any()
    assert set(load_file(folder / artifact.PARAMETERS)) == model
    assert zeros_of(folder) == set(toy.state()) - model
    assert_holds(folder, 0)


@pytest.mark.parametrize("value", [1.0, -0.0, np.nan])
def test_state_that_is_not_all_zeros_is_stored(tmp_path, value):
    weight, bias = (spec.name for spec in toy.VELOCITY)
    state = toy.state()
    state[weight][0, 0] = value
    folder = Artifact(toy.manifest(), state, Code()).save(tmp_path / "out")
    assert weight in load_file(folder / artifact.PARAMETERS)
    assert zeros_of(folder) == {bias, "random:state"}
    found = artifact.read(folder).state
    assert found.keys() == state.keys()
    assert all(found[name].tobytes() == state[name].tobytes() for name in state)


def test_what_is_said_to_be_zeros_must_not_be_stored_too(folder):
    data = artifact._tensor_bytes(toy.state())
    (folder / artifact.PARAMETERS).write_bytes(data)
    listed = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(folder, lambda content: content["files"].update({artifact.PARAMETERS: listed}))
    with pytest.raises(ArtifactError, match=r"random:state is unexpected"):
        artifact.read(folder)


def test_scalars_empty_tensors_and_views_come_back(tmp_path):
    values = {"a": np.float32(3), "b": np.zeros((0, 2), bool), "c": np.arange(6.0).reshape(2, 3).T, "d": np.array(5)}
    specs = {name: TensorSpec("buffer", name, np.shape(v), str(np.asarray(v).dtype)) for name, v in values.items()}
    artifact.write_checkpoint(tmp_path / "state", {name: np.asarray(v) for name, v in values.items()}, 7, "0")
    state, steps = artifact.read_checkpoint(tmp_path / "state", specs)
    assert steps == 7
    for name, value in values.items():
        np.testing.assert_array_equal(state[name], value)
        assert state[name].shape == np.shape(value)


def test_save_replaces_an_artifact_and_leaves_other_files_alone(folder):
    (folder / "now.safetensors").write_text("a checkpoint of the user's")
    fake(1, plan=None).save(folder)
    assert_holds(folder, 1)
    assert sorted(os.listdir(folder)) == ["lib.so", "manifest.json", "now.safetensors", "parameters.safetensors"]


def test_code_that_cannot_be_linked_is_an_error_and_nothing_is_written(tmp_path):
    class Broken(Code):
        def export_library(self, file_name: str) -> None:
            raise RuntimeError("g++ not found")

    with pytest.raises(DeviceError, match=r"g\+\+ not found"):
        Artifact(toy.manifest(), toy.state(), Broken()).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Damage.


@pytest.mark.parametrize("name", ["manifest.json", "lib.so", "parameters.safetensors", "plan.toml"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=rf"{name}.*missing"):
        artifact.read(folder)


@pytest.mark.parametrize("name", ["lib.so", "parameters.safetensors", "plan.toml"])
def test_a_truncated_file_is_named(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-3])
    with pytest.raises(ArtifactError, match=rf"{name}: it has {len(data) - 3} bytes and the manifest says {len(data)}"):
        artifact.read(folder)


@pytest.mark.parametrize("name", ["lib.so", "parameters.safetensors", "plan.toml"])
def test_a_flipped_byte_is_named(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"{name}: its sha256"):
        artifact.read(folder)


def without_kernels(content):
    del content["kernels"]


def with_features_of_the_device(content):
    content["device"]["features"] = content.pop("features")


def without_zeros(content):
    del content["zeros"]


@pytest.mark.parametrize(("number", "change"), [(2, without_kernels), (3, with_features_of_the_device), (4, without_zeros)])
def test_a_manifest_of_an_earlier_format_is_refused_with_its_version(folder, number, change):
    def earlier(content):
        content["format"] = number
        change(content)

    edit(folder, earlier)
    with pytest.raises(ArtifactError, match=rf"format {number}, written by tvmtrain 0\.1\.0, .* build the artifact again"):
        artifact.read(folder)


@pytest.mark.parametrize("place", ["nowhere", "file", "empty"])
def test_what_is_no_artifact_is_refused(tmp_path, place):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        artifact.read(tmp_path / place)


def test_a_manifest_of_the_future_is_refused_with_its_version(folder):
    def change(content):
        content["format"] = artifact.FORMAT + 1
        content["versions"] = {"tvmtrain": "9.1"}
        content["new"] = []

    edit(folder, change, sign=False)
    with pytest.raises(ArtifactError, match=r"format 6, written by tvmtrain 9\.1, and this tvmtrain reads format 5"):
        artifact.read(folder)


def test_a_manifest_from_before_memory_was_typed_is_refused_with_its_version(folder):
    edit(folder, lambda content: content.update(format=1, memory={"parameter": 84, "train_step arena": 0}))
    with pytest.raises(ArtifactError, match=r"format 1, written by tvmtrain 0\.1\.0, .* build the artifact again"):
        artifact.read(folder)


def test_an_edited_manifest_is_refused(folder):
    edit(folder, lambda content: content.update(lr=0.2), sign=False)
    with pytest.raises(ArtifactError, match="digest"):
        artifact.read(folder)


def test_another_processor_is_refused_but_can_be_looked_at(tmp_path):
    folder = fake(device={"name": "board", "arch": "riscv64"}).save(tmp_path / "out")
    with pytest.raises(ArtifactError, match=r"compiled for riscv64 \(device 'board'\) and this machine is"):
        artifact.read(folder)
    assert artifact.read(folder, foreign=True).manifest.device["name"] == "board"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["entries"][0]["inputs"][0].update(role="magic"), "role 'magic'"),
        (lambda c: c["entries"][0]["inputs"][0].update(dtype="complex64"), "complex64"),
        (lambda c: c["entries"][0]["inputs"][0].update(shape=[4, -6]), "-6"),
        (lambda c: c["entries"][0]["inputs"][0].update(shape=[True, 6]), "want int only"),
        (lambda c: c["entries"][1]["inputs"][0].update(shape=[4, 7]), "in one place"),
        (lambda c: c["entries"].pop(1), "entries are"),
        (lambda c: c["entries"].append(c["entries"][0]), "each once"),
        (lambda c: c["entries"][0]["inputs"].pop(2), "role 'rate'"),
        (lambda c: c["entries"][0]["inputs"].pop(), "returns state that it does not take: random:state"),
        (lambda c: c["aliases"].update(other="nothing"), "alias"),
        (lambda c: c["trained"].append("fc.seen"), "no parameters: fc.seen"),
        (lambda c: c["loss"].update(name="hinge"), "hinge"),
        (lambda c: c["loss"].update(classes=None), "bound of the labels"),
        (lambda c: c.update(batch=0), "batch=0"),
        (lambda c: c.update(batch=True), "'batch' is bool; want int"),
        (lambda c: c.update(lr=float("inf")), "finite"),
        (lambda c: c.pop("optimizer"), "lacks 'optimizer'"),
        (lambda c: c["unread"].pop(), "fc.scale is unexpected"),
        (lambda c: c["unread"].append({"role": "buffer", "name": "b", "shape": [1], "dtype": "int8"}), "b is missing"),
        (lambda c: c["unread"][0].update(shape=[3]), r"fc.scale is float32\[2\], want float32\[3\]"),
        (lambda c: c.pop("zeros"), "lacks 'zeros'"),
        (lambda c: c.update(zeros={}), "'zeros' is dict; want list"),
        (lambda c: c["zeros"].append(3), "want str only"),
        (lambda c: c["zeros"].append("nothing"), "zeros: nothing: want state of the optimizer"),
        (lambda c: c["zeros"].append("fc.bias"), "zeros: fc.bias: want state of the optimizer"),
        (lambda c: c["zeros"].append("random:state"), "want each once"),
        (lambda c: c["zeros"].remove("random:state"), "random:state is missing"),
        (lambda c: reshape(c, "random:state", [2**70]), "which no array can be"),
        (lambda c: c.pop("memory"), "lacks 'memory'"),
        (lambda c: c.update(memory={"train_step arena": 0}), "memory lacks 'entries'"),
        (lambda c: c["memory"]["entries"].pop("predict"), "memory is that of train_step, loss, gradients; entries are"),
        (lambda c: c["memory"]["entries"].pop("train_step"), "want train_step"),
        (lambda c: step_memory(c).pop("results"), "train_step lacks 'results'"),
        (lambda c: step_memory(c).update(arena="128"), "'arena' is str; want int"),
        (lambda c: step_memory(c).update(results=-1), "results below 0"),
        (lambda c: step_memory(c).update(arena=119), "want saved bytes <= lower_bound <= arena"),
        (lambda c: step_memory(c).update(saved_masks=121), "want saved bytes <= lower_bound <= arena"),
        (lambda c: step_memory(c).update(lower_bound=128), "timeline: peak"),
        (lambda c: step_memory(c).update(saved_masks=47), "timeline: peak"),
        (lambda c: step_memory(c).update(workspace=9), "timeline: peak"),
        (lambda c: c["memory"]["timeline"].pop("masks"), "timeline lacks 'masks'"),
        (lambda c: c["memory"]["timeline"].update(masks=[48]), "want one number"),
        (lambda c: c["memory"]["timeline"].update(loss=2), "loss in 2"),
        (lambda c: c["memory"]["timeline"].update(results=[-1, 0]), "results below 0 bytes"),
        (lambda c: c["memory"]["timeline"].update(results=[0.5, 0]), "want int only"),
        (lambda c: c["costs"][0].update(kept=-1), "costs of layer 'fc': kept below 0"),
        (lambda c: c["costs"][0].pop("flops"), "lacks 'flops'"),
        (lambda c: c["files"].update({"../x": {"size": 1, "sha256": ""}}), r"files are \['../x'"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(folder, change, message):
    edit(folder, change)
    with pytest.raises(ArtifactError, match=message):
        artifact.read(folder)


def test_state_that_does_not_fit_is_refused_when_an_artifact_is_made():
    with pytest.raises(ArtifactError, match=r"fc\.bias is missing"):
        Artifact(toy.manifest(), {k: v for k, v in toy.state().items() if k != "fc.bias"}, Code())


# Fuzzing: whatever the bytes, either they are refused with our error or they mean the same as before.


def mutations(data: bytes) -> st.SearchStrategy[bytes]:
    """``data`` with a few bytes replaced, cut out or put in."""
    edits = st.tuples(st.integers(0, len(data)), st.integers(0, 8), st.binary(max_size=8))

    def apply(pieces):
        changed = data
        for start, length, piece in pieces:
            changed = changed[:start] + piece + changed[start + length :]
        return changed

    return st.lists(edits, min_size=1, max_size=3).map(apply)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@fuzz
@given(data=st.data())
def test_no_bytes_of_a_manifest_raise_anything_else(folder, data):
    path = folder / artifact.MANIFEST
    path.write_bytes(data.draw(mutations(fresh_manifest())))
    refused_or(folder, lambda stored: stored.manifest == toy.manifest())


@fuzz
@given(data=st.data())
def test_no_content_of_a_signed_manifest_raises_anything_else(folder, data):
    (folder / artifact.MANIFEST).write_bytes(fresh_manifest())

    def change(content):
        place, keys = content, None
        while isinstance(place, (dict, list)) and place and (keys is None or data.draw(st.integers(0, 3))):
            parent, keys = place, sorted(place) if isinstance(place, dict) else range(len(place))
            key = data.draw(st.sampled_from(keys))
            place = parent[key]
        parent[key] = data.draw(JSON)

    edit(folder, change)
    refused_or(folder, lambda stored: isinstance(stored.manifest, Manifest))


@fuzz
@given(data=st.data())
def test_no_bytes_of_weights_raise_anything_else(folder, data):
    """Even where size and sha256 fit: the bytes are then those of another program."""
    changed = data.draw(mutations(fresh_weights()))
    (folder / artifact.MANIFEST).write_bytes(fresh_manifest())
    (folder / artifact.PARAMETERS).write_bytes(changed)
    if changed != fresh_weights():
        with pytest.raises(ArtifactError, match=artifact.PARAMETERS):
            artifact.read(folder)
    listed = {"size": len(changed), "sha256": hashlib.sha256(changed).hexdigest()}
    edit(folder, lambda content: content["files"].update({artifact.PARAMETERS: listed}))
    refused_or(folder, lambda stored: set(stored.state) == set(toy.state()))


@fuzz
@given(data=st.data())
def test_no_bytes_of_a_checkpoint_raise_anything_else(tmp_path, data):
    path = tmp_path / "now.safetensors"
    artifact.write_checkpoint(path, toy.state(), 3, "0.1.0")
    path.write_bytes(data.draw(mutations(path.read_bytes())))
    try:
        state, steps = artifact.read_checkpoint(path, toy.manifest().state)
    except CheckpointError:
        return
    assert steps == 3
    same_tensors(state, toy.state())


def test_a_deeply_nested_manifest_is_refused(folder):
    (folder / artifact.MANIFEST).write_text("[" * 100_000)
    with pytest.raises(ArtifactError):
        artifact.read(folder)


def fresh_manifest() -> bytes:
    made = fake()
    plan = made.manifest.plan.encode()
    files = {artifact.LIBRARY: made.executable.content, artifact.PARAMETERS: fresh_weights(), artifact.PLAN: plan}
    return artifact._manifest_bytes(made.manifest, files, fresh_zeros())


def fresh_zeros() -> list[str]:
    return artifact._zero_names(toy.manifest(), toy.state())


def fresh_weights() -> bytes:
    return artifact._tensor_bytes({name: value for name, value in toy.state().items() if name not in fresh_zeros()})


def refused_or(folder: Path, check) -> None:
    try:
        stored = artifact.read(folder)
    except ArtifactError:
        return
    assert check(stored)


# Storage.


@pytest.fixture
def disk(tmp_path):
    """A disk of one megabyte of our own."""
    place = tmp_path / "disk"
    place.mkdir()
    with mounted(place):
        yield place


@pytest.fixture
def read_only(tmp_path):
    """A folder with an artifact and a checkpoint on a disk that became read-only: root cannot write there either."""
    place = tmp_path / "disk"
    place.mkdir()
    with mounted(place):
        fake().save(place / "out")
        checkpoint(place / "now", 0)
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        yield place


@contextlib.contextmanager
def mounted(place: Path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small disk needs root and the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def checkpoint(path: Path, seed: int) -> None:
    artifact.write_checkpoint(path, toy.state(seed), seed, "0.1.0")


def fill(place: Path) -> None:
    with pytest.raises(OSError) as caught, open(place / "filler", "wb", buffering=0) as file:  # noqa: PT011, PT012
        while True:
            file.write(bytes(4096))
    assert caught.value.errno == errno.ENOSPC


def test_a_full_disk_leaves_the_old_artifact(disk):
    fake(0).save(disk / "out")
    fill(disk)
    with pytest.raises(StorageError, match=r"cannot write .*out: No space left.*free some space"):
        fake(1).save(disk / "out")
    assert_holds(disk / "out", 0)
    assert not [name for name in os.listdir(disk / "out") if "new" in name]
    (disk / "filler").unlink()
    fake(1).save(disk / "out")
    assert_holds(disk / "out", 1)


def test_a_full_disk_leaves_no_half_of_a_new_artifact(disk):
    fill(disk)
    with pytest.raises(StorageError, match="No space left"):
        fake(1).save(disk / "deep" / "out")
    assert os.listdir(disk) == ["filler"]


def test_a_full_disk_leaves_the_old_checkpoint(disk):
    checkpoint(disk / "now", 0)
    fill(disk)
    with pytest.raises(StorageError, match=r"cannot write .*now: No space left"):
        checkpoint(disk / "now", 1)
    assert artifact.read_checkpoint(disk / "now", toy.manifest().state)[1] == 0
    assert sorted(os.listdir(disk)) == ["filler", "now"]


def test_a_read_only_disk_is_an_error_and_everything_is_still_there(read_only):
    with pytest.raises(StorageError, match=r"cannot write .*out: Read-only.*choose a place that can be written"):
        fake(1).save(read_only / "out")
    with pytest.raises(StorageError, match="Read-only"):
        fake(1).save(read_only / "other")
    with pytest.raises(StorageError, match="Read-only"):
        checkpoint(read_only / "now", 1)
    assert_holds(read_only / "out", 0)
    assert artifact.read_checkpoint(read_only / "now", toy.manifest().state)[1] == 0


@pytest.mark.parametrize("place", ["file", "file/out", "/proc/tvmtrain"])
def test_a_folder_that_cannot_be_made_is_an_error(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="intact"):
        fake().save(tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("place", ["file/now", "missing/now", "folder", "/dev/null", "/proc/now"])
def test_a_checkpoint_that_cannot_be_written_is_an_error(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="intact"):
        checkpoint(tmp_path / place, 1)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert not Path("/dev/null").is_file()


def test_a_checkpoint_behind_a_link_is_written_where_it_points(tmp_path):
    checkpoint(tmp_path / "now", 0)
    (tmp_path / "latest").symlink_to("now")
    checkpoint(tmp_path / "latest", 1)
    assert (tmp_path / "latest").is_symlink()
    assert artifact.read_checkpoint(tmp_path / "now", toy.manifest().state)[1] == 1


# Kills. A process without TVM forks writers and kills them; each writer saves version after version.

KILLER = """
import os, random, select, signal, sys, time
import numpy as np
from pathlib import Path
sys.path[:0] = {paths!r}
from tvmtrain import artifact
from tvmtrain.artifact import *
from tvmtrain.costs import *

where, trials, seed = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
SPEC = TensorSpec("parameter", "w", (50_000,), "float32")
SCALAR = lambda role: TensorSpec(role, role, (), "float32")
ENTRIES = (
    Entry("train_step", (SPEC, SCALAR("rate")), (SCALAR("loss"), SPEC)),
    Entry("predict", (SPEC,), ()),
    Entry("loss", (), (SCALAR("loss"),)),
)

class Code:
    def __init__(self, version): self.version = version
    def export_library(self, name): Path(name).write_bytes(b"%d" % self.version * 1000)

FIGURES, NONE = EntryMemory(0, 0, 0, 0, 0, 0), (0,)
LINE = Timeline(0, NONE, NONE, NONE, NONE, NONE, NONE, NONE)
MEMORY = Memory({{entry.name: FIGURES for entry in ENTRIES}}, LINE)

def values(version): return {{"w": np.full(50_000, version, "float32")}}

def save_artifact(version):
    device = {{"name": "host", "arch": artifact.machine()}}
    manifest = Manifest(ENTRIES, {{}}, ("w",), LossSpec("mse"), {{}}, str(version), device, {{}}, float(version), 1, MEMORY, (), ())
    Artifact(manifest, values(version), Code(version)).save(where)

def read_artifact():
    stored = artifact.read(where)
    version = int(stored.manifest.lr)
    assert stored.manifest.plan == str(version)
    assert stored.library.read_bytes() == b"%d" % version * 1000
    assert (stored.state["w"] == version).all()
    return version

def save_checkpoint(version): artifact.write_checkpoint(where, values(version), version, "0")

def read_checkpoint():
    state, version = artifact.read_checkpoint(where, {{"w": SPEC}})
    assert (state["w"] == version).all()
    return version

save, read = (save_artifact, read_artifact) if sys.argv[1] == "artifact" else (save_checkpoint, read_checkpoint)

def die_at(call):
    # Counts every call that changes the disk and dies just before one of them.
    left = [call]
    def dying(function):
        def wrapped(*arguments, **options):
            left[0] -= 1
            if left[0] == 0: os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return wrapped
    for name in ("replace", "fsync", "unlink"): setattr(os, name, dying(getattr(os, name)))

def trial(started, prepare, kill):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        prepare()
        version = started
        while True:
            version += 1
            save(version)
            os.write(writer, version.to_bytes(4, "little"))
    kill(child)
    os.waitpid(child, 0)
    os.close(writer)
    done = os.read(reader, 1 << 20)
    os.close(reader)
    confirmed = int.from_bytes(done[-4:], "little") if done else started
    found = read()
    assert found in (confirmed, confirmed + 1), (found, confirmed)
    return found

save(1)
version = 1
if seed < 0:
    # Pairs: the second save finds what the first left behind, and dies early itself.
    for first in range(1, trials + 1):
        for call in (first, 1, first, 2, first, 3):
            version = trial(version, lambda: die_at(call), lambda child: None)
else:
    chance = random.Random(seed)
    def wait_and_kill(child):
        time.sleep(chance.uniform(0.001, 0.03))
        os.kill(child, signal.SIGKILL)
    for _ in range(trials):
        version = trial(version, lambda: None, wait_and_kill)
save(version + 1)
assert read() == version + 1
names = os.listdir(where) if where.is_dir() else os.listdir(where.parent)
assert not [name for name in names if "new" in name], names
print("saved", version)
"""


@pytest.mark.parametrize("what", ["artifact", "checkpoint"])
@pytest.mark.parametrize(("trials", "seed"), [(20, 0), (20, -1)], ids=["random", "every-call"])
def test_a_kill_during_save_leaves_the_old_or_the_new(tmp_path, what, trials, seed):
    script = KILLER.format(paths=[p for p in sys.path if p])
    command = [sys.executable, "-c", script, what, str(tmp_path / "out"), str(trials), str(seed)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "saved" in result.stdout
