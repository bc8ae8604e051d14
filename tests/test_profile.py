"""Time by kernel: it adds up, its facts are those counted by hand, and a device without the compiler can do it."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tvmtrain as tt
from tvmtrain import artifact, cli, console, profile, roofline, runtime
from tvmtrain.costs import Kernel
from tvmtrain.errors import ArtifactError, DeviceError
from tvmtrain.profile import Call
from tvmtrain.roofline import Roofline

BATCH, CHANNELS, FILTERS, SIDE, CLASSES = 4, 3, 16, 32, 5
PEAK = Roofline(100e9, 20e9, 1, "compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A compiled step with one 3x3 convolution, whose work is known."""
    model = nn.Sequential(
        *(nn.Conv2d(CHANNELS, FILTERS, 3, padding=1, bias=False), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(FILTERS, CLASSES),
    )
    x, y = torch.randn(BATCH, CHANNELS, SIDE, SIDE), torch.randint(0, CLASSES, (BATCH,))
    return tt.build(tt.trace(model, x, y, optimizer=tt.SGD(lr=0.1, momentum=0.9))).save(tmp_path_factory.mktemp("step") / "out")


def convolutions(folder: Path) -> dict[str, Kernel]:
    return {k.name: k for k in artifact.read(folder).manifest.kernels if "conv2d" in k.name}


def test_operations_and_bytes_are_those_counted_by_hand(folder):
    taps = BATCH * FILTERS * SIDE * SIDE * CHANNELS * 9
    x, maps, weight = BATCH * CHANNELS * SIDE * SIDE, BATCH * FILTERS * SIDE * SIDE, FILTERS * CHANNELS * 9
    found = convolutions(folder)
    backward = next(k for name, k in found.items() if "wgrad" in name)
    forward = next(k for name, k in found.items() if "wgrad" not in name)
    # What is fused with a convolution (tanh, the step of SGD) is work, too, but little beside it; padding is no work.
    assert 2 * taps <= forward.flops <= 2 * taps + 2 * maps
    assert 2 * taps <= backward.flops <= 2 * taps + 10 * weight
    # The input, the weight and the output once; the backward's workspace does not count.
    assert forward.bytes == 4 * (x + weight + maps)
    assert backward.bytes <= 4 * (x + maps + 6 * weight) + 16
    assert forward.calls == backward.calls == 1


def test_every_kernel_that_is_called_is_in_the_manifest(folder):
    step = runtime.load(folder)
    with step.marked() as marks:
        step(*profile.random_batch(step.manifest), lr=0.0)
    counted: dict[str, int] = {}
    for call in profile.calls_of(marks):
        if not call.name.startswith("vm."):
            counted[call.name] = counted.get(call.name, 0) + 1
    assert counted == {kernel.name: kernel.calls for kernel in step.manifest.kernels}
    told = len(marks)
    step(*profile.random_batch(step.manifest), lr=0.0)
    assert len(marks) == told, "nobody watches any more"


def test_kernels_take_no_longer_than_the_step(folder, monkeypatch):
    monkeypatch.setattr(roofline, "measure", lambda threads: replace(PEAK, threads=threads))
    found = profile.profile(folder, quiet(), repeat=40, threads=1)
    assert 0 < found.inside <= 1.1 * found.step
    assert found.inside == pytest.approx(sum(c.us for c in found.calls if not c.name.startswith("vm.")))
    assert found.outside == pytest.approx(found.step - found.inside)
    times = [kernel.us for kernel in found.kernels]
    assert times == sorted(times, reverse=True)
    assert "conv2d" in found.kernels[0].name or "conv2d" in found.kernels[1].name
    kernel = next(k for k in found.kernels if k.bound == "arithmetic")
    assert kernel.floor == pytest.approx(kernel.flops / PEAK.flops * 1e6)
    assert 0 < found.share_of_peak("arithmetic") < 10
    json.dumps(found.to_dict())


def quiet():
    from tvmtrain.console import Console

    return Console(sys.stderr)


def test_telling_is_taken_off():
    # (name, begins, telling began, telling ended): each telling takes 2 s, the kernel 5 s, the other call nothing.
    marks = [
        *(("vm.builtin.null_value", True, 0.0, 1.0), ("vm.builtin.null_value", False, 3.0, 4.0)),
        *(("conv", True, 6.0, 7.0), ("conv", False, 14.0, 15.0)),
        *(("vm.builtin.copy", True, 17.0, 18.0), ("vm.builtin.copy", False, 20.0, 21.0)),
    ]
    assert [(c.name, c.us) for c in profile.calls_of(marks)][1:] == [("conv", 5e6), ("vm.builtin.copy", 0.0)]


def test_calls_within_calls_count_once():
    marks = [("f", True, 0, 0), ("g", True, 1, 1), ("g", False, 4, 4), ("f", False, 5, 5)]
    assert profile.calls_of(marks) == [Call("g", 2e6)]


def test_the_roofline_is_the_lower_of_two_ceilings():
    assert PEAK.seconds(100e9, 1) == 1.0
    assert PEAK.seconds(1, 20e9) == 1.0
    assert PEAK.computes(100e9, 20e9)
    assert not PEAK.computes(99e9, 20e9)
    with pytest.raises(DeviceError, match="want more than 0"):
        Roofline(0.0, 1.0, 1, "compiler")


def test_this_machine_is_measured_with_the_compiler_and_without(monkeypatch):
    monkeypatch.setattr(roofline, "STEPS", 20_000)
    monkeypatch.setattr(roofline, "TIMES_CACHE", 1)
    found = roofline.measure(1)
    assert found.source == "compiler"
    monkeypatch.setenv("TVM_USE_RUNTIME_LIB", "1")
    other = roofline.measure(1)
    assert other.source == "numpy"
    # Both see the same machine, whatever else runs on it.
    assert 0.05 < other.flops / found.flops < 5
    assert 0.05 < other.bandwidth / found.bandwidth < 20


def test_the_command_writes_a_table_a_trace_and_a_picture(folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "measure", lambda threads: replace(PEAK, threads=threads))
    trace, picture = tmp_path / "trace.json", tmp_path / "roofline.svg"
    words = ["profile", str(folder), "--repeat", "3", "--threads", "1", "--trace", str(trace), "--plot", str(picture), "--json"]
    assert cli.main(words) == 0
    out, messages = capsys.readouterr()
    result = json.loads(out)
    assert "of roofline" in messages
    assert "outside kernels" in messages
    assert result["outside_kernels"] == pytest.approx(result["step"] - result["in_kernels"])

    events = json.loads(trace.read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"X"}
    assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-6 for a, b in itertools.pairwise(events))
    kernels = [event for event in events if event["cat"] == "kernel"]
    assert len(kernels) == sum(kernel["calls"] for kernel in result["kernels"])
    assert sum(event["dur"] for event in kernels) == pytest.approx(result["in_kernels"])

    texts = {"".join(e.itertext()).strip() for e in ElementTree.parse(picture).iter("{http://www.w3.org/2000/svg}text")}
    assert {"100 GFLOP/s", "20.0 GB/s", "operations per byte"} <= texts


def test_long_names_fit_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "130")
    name = "fused_conv2d_" + "add_relu_" * 20 + "17"
    kernel = profile.KernelTime(name, 2, 10.0, 100, 100, 5.0, "memory")
    profile.show(profile.Profile("out", 1, 1, 12.0, (kernel,), 1.0, (), PEAK), console.Console())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 130
    row = next(line for line in lines if line.startswith("fused"))
    assert re.match(r"fused_conv2d_add_relu_\w*\.\.\w*relu_17 +2 ", row)


@pytest.mark.parametrize(("width", "short"), [(9, "abcdefghi"), (8, "abc..ghi"), (7, "abc..hi"), (4, "a..i")])
def test_names_lose_their_middle(width, short):
    assert console.shortened("abcdefghi", width) == short


def test_profiles_that_cannot_be_made(folder, capsys, tmp_path):
    assert cli.main(["profile", str(folder), "--plot", str(tmp_path / "r.jpg")]) == 1
    assert "got the suffix '.jpg'" in capsys.readouterr().err
    assert cli.main(["profile", str(tmp_path)]) == 1
    assert "the file is missing" in capsys.readouterr().err
    with pytest.raises(ArtifactError, match="0 calls; want 1 or more"):
        Kernel("conv", 0, 1, 1)
    with pytest.raises(ArtifactError, match="flops below 0"):
        Kernel("conv", 1, -1, 1)


def test_a_manifest_names_each_kernel_once(folder):
    manifest = artifact.read(folder).manifest
    with pytest.raises(ArtifactError, match="more than once"):
        replace(manifest, kernels=manifest.kernels * 2)
    assert artifact.Manifest.from_dict(json.loads(json.dumps(manifest.to_dict()))).kernels == manifest.kernels


def test_a_gpus_code_is_not_timed(folder, monkeypatch):
    monkeypatch.setattr(artifact, "on_gpu", lambda manifest: True)
    monkeypatch.setattr(runtime, "device", lambda manifest: runtime.tvm.cpu())
    with pytest.raises(DeviceError, match="nsys"):
        profile.profile(folder, quiet())


def test_a_device_profiles_without_pytorch_and_the_compiler(folder):
    program = f"""
import sys
for name in ("torch", "rich", "matplotlib"):
    sys.modules[name] = None
from tvmtrain import cli, roofline
roofline.TIMES_CACHE = 1
code = cli.main(["profile", {str(folder)!r}, "--repeat", "2", "--threads", "1"])
assert not {{"tvm.relax", "tvm.s_tir"}} & sys.modules.keys()
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"TVM_USE_RUNTIME_LIB": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "(by numpy)" in done.stdout
    assert "conv2d" in done.stdout


def test_random_batches_fit(folder):
    manifest = artifact.read(folder).manifest
    (x,), (y,) = profile.random_batch(manifest)
    assert (x.shape, x.dtype) == ((BATCH, CHANNELS, SIDE, SIDE), np.float32)
    assert y.dtype == np.int64
    assert y.max() <= 1
