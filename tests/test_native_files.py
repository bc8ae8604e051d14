"""What the native half reads: right files as Python reads them, and wrong ones, thousands of them, without a byte out of bounds."""

from __future__ import annotations

import copy
import hashlib
import json
import platform
import random
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
from builds import probe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machines import MACHINES
from safetensors import numpy as tensor_file

from tvmtrain import artifact, features, native, selection
from tvmtrain.artifact import SELECTS, Selection
from tvmtrain.training import order

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64"), reason="the native half is for x86-64 and aarch64"
)


def read(files: Iterable[bytes]) -> list[str]:
    """The lines that the probe prints for ``files``; whatever a sanitizer finds ends the test."""
    with tempfile.TemporaryDirectory() as folder:
        names = []
        for i, content in enumerate(files):
            names.append(f"{folder}/{i}")
            Path(names[-1]).write_bytes(content)
        options = {
            "ASAN_OPTIONS": "allocator_may_return_null=0:max_allocation_size_mb=2000",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        lines = []
        for start in range(0, len(names), 1000):
            done = subprocess.run([probe(), *names[start : start + 1000]], capture_output=True, env=options, timeout=300)
            assert done.returncode == 0, done.stderr.decode(errors="replace")[-4000:]
            lines += done.stdout.decode().splitlines()
    return lines


def _letter(kind: str, content: Any) -> bytes:
    return kind.encode() + json.dumps(content).encode()


# What is computed is what Python computes.


choices = st.tuples(
    *(st.integers(1, 300), st.floats(0, 1), st.sampled_from(SELECTS[2:]), st.integers(-(2**63), 2**63 - 1)),
    *(st.integers(0, 2**40), st.text("aé.0", max_size=9)),
)


@given(st.lists(choices, min_size=1, max_size=200))
@settings(max_examples=10, deadline=None)
def test_channels_are_those_of_python(cases: list[tuple[int, float, str, int, int, str]]) -> None:
    files, wanted = [], []
    for channels, share, select, seed, step, layer in cases:
        chosen = Selection(layer, "w", channels, max(1, int(share * channels)), select, seed)
        facts = {
            "layer": layer,
            "channels": channels,
            "count": chosen.count,
            "select": SELECTS.index(select),
            "seed": seed,
            "step": step,
        }
        files.append(_letter("S", facts))
        wanted.append(selection.channels(chosen, step, selection.seeds([chosen])).tolist())
    assert [[int(c) for c in line.split()] for line in read(files)[:-1]] == wanted


def test_largest_channels_are_those_of_python() -> None:
    """In weights of few values, where sums are equal or nearly so: the order of additions decides."""
    generator = np.random.default_rng(0)
    files, wanted = [], []
    for shape in [
        (1, 3),
        (7, 5, 3, 3),
        (16, 1, 3, 3),
        (12, 1, 5, 5),
        (40, 6, 1, 1),
        (33, 4, 7, 7),
        (130, 9),
        (600, 3, 1, 1),
    ] * 6:
        channels = shape[1] if shape[1] > 1 else shape[0] // int(generator.integers(1, 3))
        chosen = Selection("l", "w", channels, max(1, channels // 2), "magnitude", 0)
        weight = generator.choice(np.float32([0.1, -0.1, 0.3, 0.7, 1e-3, 0]), shape)
        facts = {"layer": "l", "channels": channels, "count": chosen.count, "select": 1, "seed": 0, "shape": shape}
        files.append(_letter("W", facts | {"weight": weight.astype("float64").reshape(-1).tolist()}))
        wanted.append(selection.largest([chosen], {"w": weight})["selection:l"].tolist())
    assert [[int(c) for c in line.split()] for line in read(files)[:-1]] == wanted


def test_orders_of_samples_are_those_of_python() -> None:
    cases = [(7, 0, 23), (0, 0, 1), (0, 1, 5), (2**40, 3, 1000), (1, 2**33, 7000)]
    lines = read(_letter("O", {"seed": seed, "epoch": epoch, "count": count}) for seed, epoch, count in cases)
    for line, (seed, epoch, count) in zip(lines, cases, strict=False):
        assert [int(i) for i in line.split()] == order(count, epoch, seed, True).tolist()


@given(st.lists(st.binary(max_size=700), min_size=1, max_size=50))
@settings(max_examples=10, deadline=None)
def test_checksums_are_those_of_python(contents: list[bytes]) -> None:
    assert read(b"H" + content for content in contents)[:-1] == [hashlib.sha256(content).hexdigest() for content in contents]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4),
    max_leaves=20,
)


@given(st.lists(json_values, min_size=1, max_size=50))
@settings(max_examples=20, deadline=None)
def test_json_is_written_as_python_writes_it(values: list[Any]) -> None:
    """The digest of a manifest depends on it."""
    spaced = [b"A" + json.dumps(value, indent=2, ensure_ascii=False).encode() for value in values]
    assert read(spaced)[:-1] == [json.dumps(value, sort_keys=True) for value in values]


def test_memory_is_that_of_the_machine_or_of_its_container(tmp_path: Path) -> None:
    roots = [case.write(tmp_path / case.name) for case in MACHINES]
    lines = read(b"R" + str(root).encode() for root in roots)
    assert lines[:-1] == [f"{case.total} {case.available}" for case in MACHINES]


def test_features_of_processors_are_those_of_python() -> None:
    source = (native.SOURCES / "src/machine.cc").read_text()
    for feature in features.AARCH64:
        assert f'{{"{feature.name}", {feature.word}, {feature.bit}}},' in source
    assert source.count(", 16, ") + source.count(", 26, ") == len(features.AARCH64)


# Wrong files.

GOOD_STATE = toy.state()
ZEROS = artifact._zero_names(toy.manifest(), GOOD_STATE)
STORED = {name: value for name, value in GOOD_STATE.items() if name not in ZEROS}
GOOD_MANIFEST = json.loads(artifact._manifest_bytes(toy.manifest(), {artifact.LIBRARY: b"", artifact.PARAMETERS: b""}, ZEROS))
GOOD_DATA = {"x": np.ones((9, toy.FEATURES), "float32"), "y": np.ones(9, "int64")}
IMAGES = {"x": np.ones((9, toy.FEATURES), "uint8"), "y": np.ones(9, "int64")}

NUMBERS = (0, -1, 1, 3, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 0.5, 1e308, -0.0)
OTHERS = (
    None,
    True,
    "",
    "x",
    "\0",
    "é",
    [],
    {},
    [[]],
    [0],
    [-1],
    [2**62, 2**62],
    {"": 0},
    "F32",
    "U8",
    "float32",
    "channels",
    "magnitude",
)


def _changed(value: Any, chance: random.Random) -> Any:
    """A copy of a JSON value with something in it replaced, removed or doubled."""
    root = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        place = root
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = chance.choice(keys)
            if isinstance(place[key], (dict, list)) and place[key] and chance.random() < 0.85:
                place = place[key]
                continue
            _change(place, key, chance)
            break
    return root


def _change(place: Any, key: Any, chance: random.Random) -> None:
    what = chance.randrange(4)
    if what == 0:
        place[key] = chance.choice(NUMBERS)
    elif what == 1:
        place[key] = copy.deepcopy(chance.choice(OTHERS))
    elif what == 2:
        del place[key]
    elif isinstance(place, list):
        place.append(copy.deepcopy(place[key]))
    else:
        place[str(key) + chance.choice(("", "2", "é"))] = copy.deepcopy(place[chance.choice(list(place))])


def _damaged(data: bytes, chance: random.Random) -> bytes:
    """Bytes changed, cut off, left out, put in or doubled."""
    content = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(len(content) + 1) if chance.random() < 0.5 else chance.randrange(min(len(content), 64) + 1)
        what = chance.randrange(5)
        if what == 0 and at < len(content):
            content[at] = chance.choice((content[at] ^ 1 << chance.randrange(8), 0, 255, 0x22, 0x7B, 0x5D, 0x80))
        elif what == 1:
            del content[at:]
        elif what == 2:
            del content[at : at + chance.randrange(1, 20)]
        elif what == 3:
            content[at:at] = chance.randbytes(chance.randrange(1, 9))
        else:
            content[at:at] = content[at : at + chance.randrange(1, 40)]
    return bytes(content)


def _with_header(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file whose header is sound JSON and says something else."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(_changed(json.loads(data[8 : 8 + size]), chance)).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _tensor_files() -> list[tuple[bytes, bytes]]:
    images = tensor_file.save(IMAGES, {"mean": "[0.1, 0.2, 0.3, 0.1, 0.2, 0.3]", "std": "[0.5]"})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        artifact.write_checkpoint(path, GOOD_STATE, 7, "0.1.0")
        checkpoint = path.read_bytes()
    same = tensor_file.save(IMAGES, {"mean": "[0.1]", "std": "[0.5]"})
    kinds = [(b"T", tensor_file.save(GOOD_STATE)), (b"P", tensor_file.save(STORED)), (b"C", checkpoint)]
    return [*kinds, *((b"D", data) for data in (tensor_file.save(GOOD_DATA), images, same))]


MANIFEST_FILE = _letter("M", GOOD_MANIFEST)


def test_right_files_are_accepted() -> None:
    files = [MANIFEST_FILE, *(kind + data for kind, data in _tensor_files())]
    assert read(files)[-1] == f"{len(files)} of {len(files)} accepted"


def _accepted(zeros: object, state: dict[str, np.ndarray]) -> list[bool]:
    """Whether a manifest with these ``zeros`` is accepted, and then a file of parameters with ``state``."""
    files = (_letter("M", GOOD_MANIFEST | {"zeros": zeros}), b"P" + tensor_file.save(state))
    manifest, both = (int(read(files[:count])[-1].split()[0]) for count in (1, 2))
    return [manifest == 1, both == 2]


def test_what_is_not_stored_must_be_said_to_be_zeros() -> None:
    assert ZEROS
    assert _accepted(ZEROS, STORED) == [True, True]
    assert _accepted([], GOOD_STATE) == [True, True]
    for zeros, state in ((ZEROS, GOOD_STATE), ([], STORED), (ZEROS[1:], STORED)):
        assert _accepted(zeros, state) == [True, False]
    for zeros in ({}, [3], [*ZEROS, ZEROS[0]], [*ZEROS, "nothing"], [*ZEROS, "fc.bias"]):
        assert _accepted(zeros, STORED) == [False, False]


@pytest.mark.parametrize("seed", range(2))
def test_thousands_of_wrong_manifests(seed: int) -> None:
    chance = random.Random(seed)
    text = json.dumps(GOOD_MANIFEST).encode()
    files = [_letter("M", _changed(GOOD_MANIFEST, chance)) for _ in range(1000)]
    files += [chance.choice((b"M", b"J")) + _damaged(text, chance) for _ in range(500)]
    accepted = int(read(files)[-1].split()[0])
    # Many of the changes are to what the runner does not read.
    assert 0 < accepted < 1200


@pytest.mark.parametrize("seed", range(2))
def test_thousands_of_wrong_tensor_files(seed: int) -> None:
    chance = random.Random(100 + seed)
    sources = _tensor_files()
    files = [MANIFEST_FILE]
    for i in range(2000):
        kind, data = chance.choice(sources)
        if i % 500 == 0:
            files.append(MANIFEST_FILE)
        files.append(kind + (_with_header if chance.random() < 0.6 else _damaged)(data, chance))
    assert 0 < int(read(files)[-1].split()[0]) < 1000


@given(st.binary(max_size=300), st.lists(st.integers(0, 2**64 - 1), max_size=3), st.sampled_from("JMTPCD"))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_bytes_at_all(data: bytes, lengths: list[int], kind: str) -> None:
    heads = [len(data).to_bytes(8, "little"), *(length.to_bytes(8, "little") for length in lengths)]
    read([MANIFEST_FILE, kind.encode() + data, *(kind.encode() + head + data for head in heads)])


def test_deep_and_long_files_end_in_an_error() -> None:
    deep = [b"J" + opening * 100_000 for opening in (b"[", b'{"a":', b'[{"a":')]
    assert read([*deep, b"J" + b"9" * 10_000_000, b"T" + (2**63 + 5).to_bytes(8, "little") + b"{}"])[-1] == "1 of 5 accepted"
    many = b"J[" + b"[]," * (4 << 20) + b"[]]"
    assert read([many])[-1] == "0 of 1 accepted"


def test_data_of_unlike_lengths_are_refused() -> None:
    """A column without samples is not one whose length is not known yet."""
    for x, y in ((0, 9), (9, 0), (0, 0), (8, 9)):
        unlike = {"x": np.ones((x, toy.FEATURES), "float32"), "y": np.ones(y, "int64")}
        assert read([MANIFEST_FILE, b"D" + tensor_file.save(unlike)])[-1] == "1 of 2 accepted"
