"""Samples for a compiled step: an .npz file, a board's .safetensors file, or a folder of images per class. PIL for image files only.

Samples stay as they are stored (images as bytes) until their batch is asked for. What happens then, in this order, so that
another program can do the same: channels first; uint8 / 255; resized to the compiled height and width, if it differs, by
``resize``; (x - mean) / std. ``Data.notes`` tell of the first and the third; arrays are not stretched to another shape. A board's
file (``encoded``) has this done, but for images that stay bytes and their numbers beside them.
"""

from __future__ import annotations

import functools
import json
import math
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors import numpy as tensor_file

from tvmtrain import artifact, checks
from tvmtrain.artifact import LossSpec, Manifest, TensorSpec
from tvmtrain.errors import InputError

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
SUFFIX = ".safetensors"  # of a board's file
CHECKED_AT_ONCE = 1024  # samples
TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = ("test", "val", "validation", "valid")


@dataclass(frozen=True)
class Normalization:
    """(x - mean) / std of images scaled to 0..1; one number, or one per channel."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if any(not 0 < np.float32(s) < np.inf for s in self.std):
            raise InputError(f"std is {self.std}; want positive numbers that float32 has")
        if any(not np.isfinite(np.float32(m)) for m in self.mean):
            raise InputError(f"mean is {self.mean}; want numbers that float32 has")

    def check(self, channels: int) -> None:
        """Raise ``InputError`` unless there is one number, or one per channel."""
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                raise InputError(f"{name} has {len(values)} numbers; want 1, or {channels}, one per channel")

    def apply(self, x: np.ndarray) -> np.ndarray:
        """``x`` float32 [N, C, ...]."""
        if self == Normalization():
            return x
        mean, std = (np.array(v, "float32").reshape(-1, *(1,) * (x.ndim - 2)) for v in (self.mean, self.std))
        return (x - mean) / std


@dataclass(frozen=True)
class Dataset:
    """Samples as they are stored; ``batch`` gives them as the compiled step takes them.

    ``inputs`` and ``targets`` have one array for each input and target of the step, of ``specs``; all are equally long. ``ready``: what
    is not bytes is normalized already.
    """

    inputs: tuple[np.ndarray, ...]
    targets: tuple[np.ndarray, ...]
    specs: tuple[TensorSpec, ...]
    normalization: Normalization = field(default_factory=Normalization)
    ready: bool = False

    def __len__(self) -> int:
        return len(self.targets[0])

    def batch(self, indices: Sequence[int] | np.ndarray) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """(inputs, targets) of the samples ``indices``."""
        rows = np.asarray(indices)
        pairs = zip((*self.inputs, *self.targets), self.specs, strict=True)
        made = [self.prepared(array[rows], spec) for array, spec in pairs]
        return tuple(made[: len(self.inputs)]), tuple(made[len(self.inputs) :])

    def prepared(self, samples: np.ndarray, spec: TensorSpec) -> np.ndarray:
        """Some of the stored samples as the input or target ``spec``."""
        done = self.ready and samples.dtype != np.uint8
        return prepare(samples, spec, Normalization() if done else self.normalization)

    def limited(self, count: int | None) -> Dataset:
        """``count`` samples, evenly spread over all (sample i is number i * len // count), so that sorted classes all occur."""
        if count is None or count >= len(self):
            return self
        rows = np.arange(count) * len(self) // count
        return replace(self, inputs=tuple(a[rows] for a in self.inputs), targets=tuple(a[rows] for a in self.targets))


@dataclass(frozen=True)
class Data:
    """What a file or folder holds: samples to train on, samples to evaluate on, either possibly None; names of classes.

    ``notes`` tell what becomes of images that are not stored as the step takes them.
    """

    train: Dataset | None
    test: Dataset | None
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def evaluation(self) -> Dataset | None:
        """The test samples, or all there are where a file holds one set only."""
        return self.test if self.test is not None else self.train

    def limited(self, count: int | None) -> Data:
        """At most ``count`` samples of each."""
        train, test = (part.limited(count) if part is not None else None for part in (self.train, self.test))
        return replace(self, train=train, test=test)


def load(
    path: str | Path, manifest: Manifest, *, keys: Mapping[str, str] | None = None, normalization: Normalization | None = None
) -> Data:
    """The samples in ``path`` for the step of ``manifest``.

    An .npz has, for an input named x and a target y, x and y (or x_train and y_train), and x_test and y_test to evaluate on;
    ``keys`` maps these names to others. A .safetensors file has the same, as ``tvmtrain-run`` takes them: what is not bytes is ready,
    and it says itself how bytes are normalized. A folder has one folder of images per class, sorted by name, or train/ and test/ of
    such. Raises ``InputError`` for what is missing or does not fit the step, in any sample: shapes, dtypes, NaN, labels.
    """
    path, normalization = Path(path), normalization or Normalization()
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    specs = tuple(spec for spec in manifest.named["train_step"].inputs if spec.role in ("input", "target"))
    ready = path.suffix == SUFFIX and not path.is_dir()
    if path.is_dir():
        found = _read_folder(path, specs, manifest)
    else:
        arrays = _read_tensors(path) if ready else _read_npz(path, specs)
        found = _named(arrays, specs, keys or {}, path)
    if ready:
        normalization = _own_normalization(path, normalization)
    train, test = (_dataset(part, specs, normalization, ready, path) for part in (found.train, found.test))
    for part in (train, test):
        _check(part, manifest.loss, path)
    data = Data(train, test, found.classes, found.notes if path.is_dir() else _changes(train, path) + _changes(test, path))
    if data.evaluation is None:
        raise InputError(f"{path}: no samples in it")
    return data


def write(path: str | Path, dataset: Dataset) -> None:
    """Write ``encoded`` samples into a file. Raises ``StorageError``; an old file is intact."""
    artifact.write_file(Path(path), encoded(dataset))


def encoded(dataset: Dataset) -> bytes:
    """``dataset`` as a safetensors file for ``tvmtrain-run``: a tensor for each input and target, by name.

    Images stay bytes; the numbers to normalize them by lie beside them, in the file's metadata, as JSON. All else is as the step
    takes it.
    """
    pairs = zip((*dataset.inputs, *dataset.targets), dataset.specs, strict=True)
    arrays = {spec.name: _stored(array, spec, dataset) for array, spec in pairs}
    facts = {name: json.dumps(getattr(dataset.normalization, name)) for name in ("mean", "std")}
    return _in_order(tensor_file.save(arrays, facts))


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata sorted: the library writes them in any order, and equal samples make equal bytes."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _stored(samples: np.ndarray, spec: TensorSpec, dataset: Dataset) -> np.ndarray:
    if samples.dtype == np.uint8 and spec.role == "input" and spec.dtype == "float32":
        images = _channels_first(samples, spec)
        if images.shape[1:] == spec.shape[1:]:
            return np.ascontiguousarray(images)
    return np.ascontiguousarray(dataset.prepared(samples, spec).astype(spec.dtype, copy=False))


@dataclass(frozen=True)
class _Found:
    """Arrays in the order of the step's inputs and targets."""

    train: tuple[np.ndarray, ...]
    test: tuple[np.ndarray, ...]
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def _dataset(
    arrays: tuple[np.ndarray, ...], specs: tuple[TensorSpec, ...], normalization: Normalization, ready: bool, path: Path
) -> Dataset | None:
    """Checked on its first sample, so that a wrong shape is told before training starts."""
    if not arrays:
        return None
    counts = {spec.name: len(array) if array.ndim else 0 for spec, array in zip(specs, arrays, strict=True)}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise InputError(f"{path}: numbers of samples are {counts}; want one number for all, and at least 1")
    inputs = sum(spec.role == "input" for spec in specs)
    dataset = Dataset(arrays[:inputs], arrays[inputs:], specs, normalization, ready)
    try:
        dataset.batch([0])
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return dataset


def _check(dataset: Dataset | None, loss: LossSpec, path: Path) -> None:
    """Raise ``InputError`` for the first sample that a step would refuse, hours later perhaps, and on a board."""
    pairs = zip((*dataset.inputs, *dataset.targets), dataset.specs, strict=True) if dataset is not None else ()
    for array, spec in pairs:
        as_is = spec.role == "target" or np.dtype(spec.dtype).kind != "f"  # other inputs were looked at by ``prepare``
        for first in range(0, len(array), CHECKED_AT_ONCE):
            samples = array[first : first + CHECKED_AT_ONCE]
            try:
                if as_is:
                    samples = prepare(samples, spec, Normalization())
                    _check_shape(samples, spec)
                if as_is or samples.dtype.kind == "f":
                    samples = checks.cast(samples, spec)
                checks.check(spec, samples, loss, first)
            except InputError as error:
                raise InputError(f"{path}: {error}") from error


def _check_shape(samples: np.ndarray, spec: TensorSpec) -> None:
    if samples.shape[1:] != spec.shape[1:]:
        raise InputError(f"{spec.role} {spec.name!r} has samples of shape {samples.shape[1:]}; want {spec.shape[1:]}")


def _changes(dataset: Dataset | None, path: Path) -> tuple[str, ...]:
    """What ``prepare`` does to the stored images. Raises ``InputError`` where it would stretch them."""
    if dataset is None:
        return ()
    notes = []
    for array, spec in zip(dataset.inputs, dataset.specs, strict=False):
        if len(spec.shape) != 4 or np.dtype(spec.dtype).kind != "f":
            continue
        images = _channels_first(array, spec)
        if images is not array and array.ndim == 4:
            stored, made = ("x".join(map(str, shape[1:])) for shape in (array.shape, images.shape))
            notes.append(f"{path}: {spec.name}: channels last ({stored}) turned into channels first ({made})")
        if images.shape[2:] != spec.shape[2:]:
            _check_stretch(images.shape[2:], spec, path)
            notes.append(f"{path}: {spec.name}: {_size(images.shape)} resized to {_size(spec.shape)}")
    return tuple(notes)


def _check_stretch(stored: tuple[int, ...], spec: TensorSpec, path: Path) -> None:
    (height, width), (wanted_height, wanted_width) = stored, spec.shape[2:]
    if not height or not width:
        raise InputError(
            f"{path}: {spec.name!r} has images of {height}x{width}: no pixels; want {wanted_height}x{wanted_width}"
        )
    # A pixel more or less is rounding.
    if min(abs(wanted_width * height / width - wanted_height), abs(wanted_height * width / height - wanted_width)) > 1:
        batch, channels = spec.shape[:2]
        raise InputError(
            f"{path}: {spec.name!r} has images of {height}x{width} and the step takes {wanted_height}x{wanted_width}, which would "
            f"stretch them: crop or pad them to this shape first, or compile for theirs (--x {batch}x{channels}x{height}x{width})"
        )


def _size(shape: Sequence[int]) -> str:
    """Height and width."""
    return f"{shape[-2]}x{shape[-1]}"


# Files of named arrays.


def _read_npz(path: Path, specs: Sequence[TensorSpec]) -> dict[str, np.ndarray]:
    try:
        stored = np.load(path, allow_pickle=False)
        if isinstance(stored, np.ndarray):
            raise InputError(
                f"{path}: one .npy array; want an .npz with {_wanted(specs)}: numpy.savez(path, x=images, y=labels)"
            )
        with stored:
            return {name: stored[name] for name in stored.files}
    except InputError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not a readable .npz file of plain arrays: {error}") from error


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        return tensor_file.load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: not a readable safetensors file of NumPy's dtypes: {error}") from error


def _own_normalization(path: Path, given: Normalization) -> Normalization:
    """What the safetensors file ``path`` says of its bytes."""
    if given != Normalization():
        raise InputError(f"{path}: a safetensors file says itself how its images are normalized; leave mean and std out")
    with safe_open(path, "np") as file:
        facts = file.metadata() or {}
    return Normalization(**{name: _metadata_numbers(facts[name], name, path) for name in ("mean", "std") if name in facts})


def _metadata_numbers(text: str, name: str, path: Path) -> tuple[float, ...]:
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, list) or not values or any(type(v) not in (int, float) or not math.isfinite(v) for v in values):
        raise InputError(f"{path}: metadata {name!r} is {text}; want a list of numbers")
    return tuple(map(float, values))


def _named(arrays: Mapping[str, np.ndarray], specs: Sequence[TensorSpec], keys: Mapping[str, str], path: Path) -> _Found:
    unknown = {name for name in keys.values() if name not in arrays}
    if unknown:
        raise InputError(f"{path}: no array named {', '.join(sorted(unknown))}; it holds {', '.join(arrays)}")
    named = {name: array for name, array in arrays.items() if name not in keys} | {k: arrays[v] for k, v in keys.items()}
    train = _select(named, specs, ("_train", "")) or ()
    test = _select(named, specs, ("_test", "_val")) or ()
    if not train and not test:
        raise InputError(f"{path}: holds {', '.join(arrays) or 'nothing'}; want {_wanted(specs)}, or name them with --keys")
    return _Found(train, test, tuple(map(str, named.get("class_names", ()))))


def _select(
    arrays: Mapping[str, np.ndarray], specs: Sequence[TensorSpec], endings: Iterable[str]
) -> tuple[np.ndarray, ...] | None:
    """One array for each of ``specs``, all with the first ending that gives them all."""
    for ending in endings:
        names = [spec.name + ending for spec in specs]
        if all(name in arrays for name in names):
            return tuple(arrays[name] for name in names)
    return None


def _wanted(specs: Sequence[TensorSpec]) -> str:
    names = [spec.name for spec in specs]
    return f"{' and '.join(names)} (or {' and '.join(f'{n}_train' for n in names)}, {' and '.join(f'{n}_test' for n in names)})"


# Folders of images.


def _read_folder(path: Path, specs: Sequence[TensorSpec], manifest: Manifest) -> _Found:
    if len(specs) != 2 or len(specs[0].shape) != 4 or manifest.loss.name != "cross_entropy" or len(specs[1].shape) != 1:
        raise InputError(f"{path}: a folder of images is for models that take one image and give its class; use an .npz file")
    train = _first_folder(path, TRAIN_FOLDERS)
    test = _first_folder(path, TEST_FOLDERS)
    if train is None and test is None:
        train = path
    classes = _classes(train or test or path, manifest)
    parts = [_read_images(part, classes, specs[0]) if part is not None else ((), 0) for part in (train, test)]
    resized = sum(count for _, count in parts)
    note = f"{path}: {resized} images of other sizes resized to {_size(specs[0].shape)}, whatever their shape"
    return _Found(parts[0][0], parts[1][0], classes, (note,) if resized else ())


def _first_folder(path: Path, names: Iterable[str]) -> Path | None:
    """A split: a folder of one of ``names`` that itself holds folders."""
    places = (path / name for name in names)
    return next((p for p in places if p.is_dir() and any(child.is_dir() for child in p.iterdir())), None)


def _classes(path: Path, manifest: Manifest) -> tuple[str, ...]:
    classes = tuple(sorted(child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")))
    if not classes or (manifest.loss.classes is not None and len(classes) > manifest.loss.classes):
        raise InputError(f"{path}: {len(classes)} folders, one per class; the model has {manifest.loss.classes} classes")
    return classes


def _read_images(path: Path, classes: Sequence[str], spec: TensorSpec) -> tuple[tuple[np.ndarray, ...], int]:
    """(bytes [N, H, W, C] of the compiled size, class numbers [N]), and how many images had another size."""
    files = [(file, number) for number, name in enumerate(classes) for file in _files(path / name)]
    if not files:
        raise InputError(f"{path}: no images ({', '.join(IMAGES)}) in the folders {', '.join(classes[:5])}")
    if unknown := sorted(child.name for child in path.iterdir() if child.is_dir() and child.name not in classes):
        raise InputError(f"{path}: folders {', '.join(unknown[:5])} are no classes of the training set")
    _, channels, height, width = spec.shape
    images, resized = np.empty((len(files), height, width, channels), "uint8"), 0
    for i, (file, _) in enumerate(files):
        images[i], other = _read_image(file, channels, height, width)
        resized += other
    return (images, np.array([number for _, number in files], "int64")), resized


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGES) if folder.is_dir() else []


def _read_image(file: Path, channels: int, height: int, width: int) -> tuple[np.ndarray, bool]:
    """Bytes [H, W, C], and whether the file has another size."""
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("image files need Pillow: pip install pillow, or store the images in an .npz file") from error
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    if channels not in modes:
        raise InputError(f"the model takes {channels} channels; image files have 1, 3 or 4: use an .npz file")
    try:
        with Image.open(file) as image:
            other = image.size != (width, height)
            small = image.convert(modes[channels]).resize((width, height), Image.Resampling.BILINEAR)
    except OSError as error:
        raise InputError(f"{file}: not a readable image: {error}") from error
    return np.asarray(small).reshape(height, width, channels), other


# From stored samples to what the step takes.


def prepare(samples: np.ndarray, spec: TensorSpec, normalization: Normalization) -> np.ndarray:
    """``samples`` as the input or target ``spec``; raises ``InputError`` for what cannot be made to fit."""
    if spec.role == "target":
        one_column = samples.ndim == 2 and samples.shape[1] == 1 and len(spec.shape) == 1
        return samples[:, 0] if one_column else samples
    if np.dtype(spec.dtype).kind != "f":
        return samples
    x = _channels_first(samples, spec)
    if samples.dtype == np.uint8:
        x = x.astype("float32") / np.float32(255)
    if x.dtype.kind != "f":
        raise InputError(f"{spec.name!r} has dtype {samples.dtype}; want uint8 images, or floats")
    with np.errstate(over="ignore"):  # what does not fit is told with its sample
        x = x.astype("float32", copy=False)
    if len(spec.shape) == 4:
        x = resize(x, *spec.shape[2:])
    if x.shape[1:] != spec.shape[1:]:
        raise InputError(f"{spec.name!r} has samples of shape {samples.shape[1:]}; want {spec.shape[1:]}")
    if x.ndim > 1:
        normalization.check(x.shape[1])
    return np.ascontiguousarray(normalization.apply(x))


def _channels_first(samples: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Images [N, H, W, C] or [N, H, W] as [N, C, H, W]; what fits already stays."""
    if len(spec.shape) != 4 or samples.shape[1:] == spec.shape[1:]:
        return samples
    channels = spec.shape[1]
    if samples.ndim == 3 and channels == 1:
        return samples[:, None]
    # Bytes are how image files are stored, with channels last; floats are how models take them.
    last_wins = samples.dtype == np.uint8
    first, last = samples.ndim == 4 and samples.shape[1] == channels, samples.ndim == 4 and samples.shape[-1] == channels
    if last and (last_wins or not first):
        return samples.transpose(0, 3, 1, 2)
    if not first:
        raise InputError(
            f"{spec.name!r} has samples of shape {samples.shape[1:]}; want {channels} channel(s), first or last: "
            f"{spec.shape[1:]}, or another height and width"
        )
    return samples


def resize(x: np.ndarray, height: int, width: int) -> np.ndarray:
    """``x`` [N, C, H, W] float32 by bilinear interpolation, with a wider filter where it shrinks.

    As Pillow's BILINEAR, and torch's ``interpolate(mode="bilinear", antialias=True)``.
    """
    if x.shape[2] != height:
        x = np.matmul(_weights(x.shape[2], height), x)
    if x.shape[3] != width:
        x = np.matmul(x, _weights(x.shape[3], width).T)
    return x


@functools.lru_cache(maxsize=16)
def _weights(old: int, new: int) -> np.ndarray:
    """[new, old]: how much of each old pixel is in each new one: a triangle around the new pixel's centre."""
    scale = old / new
    support = max(scale, 1.0)
    centers = (np.arange(new) + 0.5) * scale
    distance = np.abs(np.arange(old) + 0.5 - centers[:, None]) / support
    weights: Any = np.maximum(1 - distance, 0)
    return (weights / weights.sum(1, keepdims=True)).astype("float32")
