"""Data sets as `tvmtrain run` reads them: .npz files, folders of images, and what becomes of a sample."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy
from safetensors.numpy import save_file

from tvmtrain import data
from tvmtrain.artifact import Entry, LossSpec, Manifest, TensorSpec
from tvmtrain.errors import InputError

RNG = np.random.default_rng(0)


def image_manifest(channels: int = 3, height: int = 8, width: int = 8, classes: int = 3) -> Manifest:
    x = TensorSpec("input", "x", (4, channels, height, width), "float32")
    y = TensorSpec("target", "y", (4,), "int64")
    rate, loss = TensorSpec("rate", "rate", (), "float32"), TensorSpec("loss", "loss", (), "float32")
    out = TensorSpec("output", "output", (4, classes), "float32")
    entries = (Entry("train_step", (x, y, rate), (loss, out)), Entry("predict", (x,), (out,)), Entry("loss", (out, y), (loss,)))
    return Manifest(
        entries, {}, (), LossSpec("cross_entropy", classes, -100), {}, None, {}, {}, 0.1, 4, toy.memory(entries), (), ()
    )


def images(count: int = 10, height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def labels(count: int = 10) -> np.ndarray:
    return np.arange(count) % 3


def save(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def read(path: Path, manifest: Manifest | None = None, **options) -> data.Data:
    return data.load(path, manifest or image_manifest(), **options)


def test_bytes_become_floats_with_channels_first(tmp_path):
    x = images()
    (got,), (y,) = read(save(tmp_path / "d.npz", x=x, y=labels())).train.batch([3, 1])
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, x[[3, 1]].transpose(0, 3, 1, 2).astype("float32") / np.float32(255))
    np.testing.assert_array_equal(y, [0, 1])


@pytest.mark.parametrize(
    ("stored", "manifest"),
    [
        (images().transpose(0, 3, 1, 2), image_manifest()),
        (images(channels=1)[..., 0], image_manifest(channels=1)),
        (images().transpose(0, 3, 1, 2).astype("float64"), image_manifest()),
        (images().astype("float32"), image_manifest()),
    ],
    ids=["bytes NCHW", "grey without channel", "floats NCHW", "floats NHWC"],
)
def test_layouts_that_are_recognised(tmp_path, stored, manifest):
    (x,), _ = read(save(tmp_path / "d.npz", x=stored, y=labels()), manifest).train.batch([0, 1])
    assert x.shape == (2, *manifest.named["predict"].inputs[0].shape[1:])
    assert x.dtype == np.float32
    scale = 1 if stored.dtype == np.uint8 else 255
    assert x.max() <= scale


def test_bytes_as_wide_as_they_have_channels_are_channels_last(tmp_path):
    x = images(height=3, width=3)
    (got,), _ = read(save(tmp_path / "d.npz", x=x, y=labels()), image_manifest(height=6, width=6)).train.batch([0])
    np.testing.assert_allclose(got[0].mean((1, 2)), x[0].mean((0, 1)) / 255, atol=0.2)


def test_normalization_per_channel_and_as_one_number(tmp_path):
    path = save(tmp_path / "d.npz", x=images(), y=labels())
    (plain,), _ = read(path).train.batch([0])
    (got,), _ = read(path, normalization=data.Normalization((0.1, 0.2, 0.3), (0.5,))).train.batch([0])
    np.testing.assert_allclose(got, (plain - np.float32([[[0.1]], [[0.2]], [[0.3]]])) / 0.5, rtol=1e-6)
    with pytest.raises(InputError, match=r"mean has 2 numbers; want 1, or 3"):
        read(path, normalization=data.Normalization((0.1, 0.2)))
    with pytest.raises(InputError, match="positive"):
        data.Normalization(std=(0.0,))
    with pytest.raises(InputError, match="std is"):
        data.Normalization(std=(1e-46,))
    with pytest.raises(InputError, match="mean is"):
        data.Normalization(mean=(float("nan"),))


@pytest.mark.parametrize("size", [(5, 7), (16, 9), (48, 48), (8, 13)])
def test_resize_is_that_of_pytorch(size):
    x = RNG.random((2, 3, 16, 13), dtype=np.float32)
    want = F.interpolate(torch.from_numpy(x), size=size, mode="bilinear", antialias=True).numpy()
    np.testing.assert_allclose(data.resize(x, *size), want, atol=1e-5)


def test_train_and_test_sets_and_their_limit(tmp_path):
    path = save(tmp_path / "d.npz", x_train=images(9), y_train=labels(9), x_test=images(5), y_test=labels(5)[:, None])
    found = read(path)
    assert (len(found.train), len(found.test), found.evaluation) == (9, 5, found.test)
    assert found.test.batch([0])[1][0].shape == (1,)
    few = found.limited(3)
    np.testing.assert_array_equal(few.train.targets[0], labels(9)[[0, 3, 6]])
    assert len(few.test) == 3
    assert found.limited(100).train is found.train


def test_names_of_arrays_can_be_given(tmp_path):
    path = save(tmp_path / "d.npz", pictures=images(), digits=labels())
    assert len(read(path, keys={"x": "pictures", "y": "digits"}).train) == 10
    with pytest.raises(InputError, match=r"no array named nothing; it holds pictures, digits"):
        read(path, keys={"x": "nothing"})
    with pytest.raises(InputError, match=r"holds pictures, digits; want x and y .*--keys"):
        read(path)


def test_a_test_set_alone_is_for_evaluation(tmp_path):
    found = read(save(tmp_path / "d.npz", x_test=images(), y_test=labels()))
    assert found.train is None
    assert len(found.evaluation) == 10


def test_vectors_stay_as_they_are(tmp_path):
    x = RNG.standard_normal((7, toy.FEATURES))
    (got,), _ = read(save(tmp_path / "d.npz", x=x, y=labels(7)), toy.manifest()).train.batch([2])
    np.testing.assert_array_equal(got, x[[2]].astype("float32"))


def test_class_numbers_in_one_column_become_a_vector():
    spec = TensorSpec("target", "y", (4,), "int64")
    assert data.prepare(np.zeros((3, 1), "uint8"), spec, data.Normalization()).shape == (3,)


def folder_of_images(place: Path, count: int = 3, names: tuple[str, ...] = ("ant", "bee", "cat")) -> Path:
    image = pytest.importorskip("PIL.Image")
    for number, name in enumerate(names):
        (place / name).mkdir(parents=True)
        for i in range(count):
            image.fromarray(np.full((10 + i, 12, 3), 60 * number + 40, "uint8")).save(place / name / f"{i}.png")
    return place


def test_a_folder_of_images_per_class(tmp_path):
    found = read(folder_of_images(tmp_path))
    assert found.classes == ("ant", "bee", "cat")
    (x,), (y,) = found.train.batch(range(9))
    assert x.shape == (9, 3, 8, 8)
    np.testing.assert_array_equal(y, [0, 0, 0, 1, 1, 1, 2, 2, 2])
    np.testing.assert_allclose(x[:, 0, 0, 0], (60 * y + 40) / 255, atol=1e-6)
    assert found.test is None


def test_a_folder_with_train_and_test(tmp_path):
    folder_of_images(tmp_path / "train")
    folder_of_images(tmp_path / "test", 1, ("ant", "cat"))
    found = read(tmp_path)
    assert (len(found.train), len(found.test)) == (9, 2)
    np.testing.assert_array_equal(found.test.targets[0], [0, 2])
    folder_of_images(tmp_path / "test", 1, ("dog",))
    with pytest.raises(InputError, match="dog are no classes of the training set"):
        read(tmp_path)


def test_folders_that_do_not_fit(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"0 folders, one per class; the model has 3 classes"):
        read(tmp_path / "empty")
    with pytest.raises(InputError, match="4 folders"):
        read(folder_of_images(tmp_path / "many", 1, ("a", "b", "c", "d")))
    (tmp_path / "bare" / "a").mkdir(parents=True)
    with pytest.raises(InputError, match="no images"):
        read(tmp_path / "bare")
    (tmp_path / "bare" / "a" / "x.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"x\.png: not a readable image"):
        read(tmp_path / "bare")
    with pytest.raises(InputError, match=r"use an \.npz file"):
        read(tmp_path / "many", toy.manifest())


def test_a_device_without_pillow(tmp_path, monkeypatch):
    folder = folder_of_images(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InputError, match="pip install pillow"):
        read(folder)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": images(4), "y": labels(5)}, r"numbers of samples are \{'x': 4, 'y': 5\}"),
        ({"x": images(0), "y": labels(0)}, "at least 1"),
        ({"x": images(channels=2), "y": labels()}, r"samples of shape \(8, 8, 2\); want 3 channel"),
        ({"x": np.zeros((3, 7), "float32"), "y": labels(3)}, "want 3 channel"),
        ({"x": np.zeros((10, 3, 8, 8), "int32"), "y": labels()}, "dtype int32; want uint8 images, or floats"),
        ({"x": np.array([object()] * 3), "y": labels(3)}, "plain arrays"),
    ],
)
def test_arrays_that_do_not_fit(tmp_path, arrays, message):
    with pytest.raises(InputError, match=message):
        read(save(tmp_path / "d.npz", **arrays))


def test_what_becomes_of_images_is_told(tmp_path):
    path = save(tmp_path / "d.npz", x=images().transpose(0, 3, 1, 2), y=labels())
    assert read(path).notes == ()
    path = save(tmp_path / "d.npz", x=images(height=16, width=15), y=labels(), x_test=images(2), y_test=labels(2))
    turned = f"{path}: x: channels last (16x15x3) turned into channels first (3x16x15)"
    assert read(path).limited(3).notes == (
        *(turned, f"{path}: x: 16x15 resized to 8x8"),
        f"{path}: x: channels last (8x8x3) turned into channels first (3x8x8)",
    )


def test_arrays_are_not_stretched(tmp_path):
    path = save(tmp_path / "d.npz", x=images(height=4, width=8).transpose(0, 3, 1, 2), y=labels())
    with pytest.raises(InputError, match=r"d\.npz: 'x' has images of 4x8 and the step takes 8x8.*crop or pad.*--x 4x3x4x8"):
        read(path)
    empty = save(tmp_path / "empty.npz", x=np.zeros((4, 3, 8, 0), "float32"), y=labels()[:4])
    with pytest.raises(InputError, match="images of 8x0: no pixels"):
        read(empty)
    assert read(path, image_manifest(height=12, width=24)).notes == (f"{path}: x: 4x8 resized to 12x24",)


def test_a_folder_says_once_that_images_are_resized(tmp_path):
    folder_of_images(tmp_path)
    assert read(tmp_path).notes == (f"{tmp_path}: 9 images of other sizes resized to 8x8, whatever their shape",)
    assert read(tmp_path, image_manifest(height=11, width=12)).notes[0].startswith(f"{tmp_path}: 6 images of other sizes")


def changed(array: np.ndarray, at: tuple[int, ...], value: float) -> np.ndarray:
    array = array.copy()
    array[at] = value
    return array


FLOATS = np.zeros((2000, 3, 8, 8), "float32")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": changed(labels(2000), (1500,), 3)}, r"target 'y' has the label 3 in sample 1500 .*want 0\.\.2, or -100 to be"),
        ({"y": changed(labels(2000), (7,), -1)}, r"the label -1 in sample 7 "),
        ({"y": labels(2000).astype("float32")}, r"target 'y' has dtype float32; want int64; want class numbers"),
        ({"y": np.zeros((2000, 3), int)}, r"target 'y' has samples of shape \(3,\); want \(\)"),
        ({"x": changed(FLOATS, (1999, 2, 3, 4), np.nan)}, r"'x' has 1 NaN .* the first nan in sample 1999 at \(2, 3, 4\)"),
        ({"x": changed(FLOATS.astype("float64"), (0, 0, 0, 0), 1e300)}, r"the first inf in sample 0 at \(0, 0, 0\)"),
    ],
    ids=["label", "label below 0", "labels of another dtype", "labels of another shape", "NaN", "beyond float32"],
)
def test_every_sample_is_looked_at_before_the_first_step(tmp_path, arrays, message):
    with pytest.raises(InputError, match=rf"d\.npz: .*{message}"):
        read(save(tmp_path / "d.npz", **{"x": FLOATS, "y": labels(2000)} | arrays))


def test_labels_to_be_ignored_are_labels(tmp_path):
    assert len(read(save(tmp_path / "d.npz", x=images(), y=changed(labels(), (4,), -100))).train) == 10


def test_files_that_are_no_npz(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        read(tmp_path / "nowhere.npz")
    np.save(tmp_path / "one.npy", images())
    with pytest.raises(InputError, match=r"one \.npy array; want an \.npz with x and y"):
        read(tmp_path / "one.npy")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(InputError, match="not a readable"):
        read(tmp_path / "text.npz")
    whole = save(tmp_path / "whole.npz", x=images(), y=labels()).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a readable"):
        read(tmp_path / "cut.npz")


# The file of a board.


def written(folder: Path, x: np.ndarray, **how) -> tuple[data.Dataset, data.Dataset]:
    """The samples of an .npz file, and of the file that ``write`` makes of them."""
    first = read(save(folder / "d.npz", x=x, y=labels(len(x))), **how).train
    data.write(folder / "d.safetensors", first)
    return first, read(folder / "d.safetensors").train


@pytest.mark.parametrize(
    ("x", "stays"),
    [(images(), True), (images(height=5, width=5), False), (images().astype("float32"), False)],
    ids=["bytes", "bytes of another size", "floats"],
)
def test_a_boards_file_has_the_same_samples(tmp_path, x, stays):
    normalization = data.Normalization((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    first, second = written(tmp_path, x, normalization=normalization)
    assert (second.inputs[0].dtype == np.uint8) == stays
    for rows in ([0], [3, 1, 9]):
        for one, other in zip(first.batch(rows), second.batch(rows), strict=True):
            np.testing.assert_array_equal(one[0], other[0])
    data.write(tmp_path / "again.safetensors", second)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "d.safetensors").read_bytes()
    np.testing.assert_array_equal(second.limited(5).batch([4])[0][0], first.limited(5).batch([4])[0][0])


def test_a_boards_file_says_itself_how_it_is_normalized(tmp_path):
    written(tmp_path, images())
    with pytest.raises(InputError, match="leave mean and std out"):
        read(tmp_path / "d.safetensors", normalization=data.Normalization((0.5,), (0.5,)))


@pytest.mark.parametrize("mean", ["no JSON", "0.5", "[]", '["a"]', "[NaN]", "[true]"])
def test_wrong_numbers_in_a_boards_file_are_told(tmp_path, mean):
    save_file({"x": images(), "y": labels()}, tmp_path / "d.safetensors", {"mean": mean})
    with pytest.raises(InputError, match=r"d\.safetensors: metadata 'mean' is .*; want a list of numbers"):
        read(tmp_path / "d.safetensors")


def test_a_damaged_boards_file_is_told(tmp_path):
    written(tmp_path, images())
    whole = (tmp_path / "d.safetensors").read_bytes()
    for bytes_ in (b"", whole[:-1], whole[:20], b"\xff" * 8 + whole[8:]):
        (tmp_path / "d.safetensors").write_bytes(bytes_)
        with pytest.raises(InputError, match="not a readable safetensors file"):
            read(tmp_path / "d.safetensors")
