"""NVIDIA GPUs: kernels compute what PyTorch and NumPy do, compile for every architecture, and a step keeps its state on the device.

Kernels run on the GPU of this machine; where there is none, on an emulated one (``emulator``), which shows the same but for speed.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import emulator
import models
import numpy as np
import pytest
import relax_cases
import torch
from hypothesis import given
from parity import quick_device
from test_kernels import Convolution, check_convolution, convolutions
from test_kernels import slow as few_examples
from test_parity import check_double, check_single
from test_schedules import CASES, array
from torch import nn
from tvm import relax, tirx
from tvm.relax import op as R

import tvmtrain as tt
from tvmtrain import artifact, cuda_compiler, gpu_code, lowering, operators, runtime, targets, verify
from tvmtrain.errors import DeviceError
from tvmtrain.targets import Device

DEVICES = ("jetson-nano", "jetson-tx2", "jetson-xavier-nx", "jetson-orin-nano", "sm_90")
# The others wait for `pytest -m slow`.
QUICK = (
    *("scalar", "transpose", "concat", "matmul, primes", "matmul, classes", "matmul, then more"),
    *("sum of everything", "sum, prime", "bias", "bias of linear", "batch statistics", "softmax", "running sum"),
)


@pytest.fixture
def gpu() -> Iterator[Device]:
    """The GPU of this machine, or an emulated one."""
    with pytest.MonkeyPatch.context() as patch:
        if emulator.needed():
            if shutil.which("g++") is None:
                pytest.skip("neither an NVIDIA GPU nor g++, which compiles for the emulated one")
            emulator.start()
            emulated = cuda_compiler.Compiler("emulator", "0.0", emulator.compile_source)
            patch.setattr(cuda_compiler, "find", lambda *_: emulated)
        device = targets.load("cuda")
        # What starts the kernels is optimized no further: half of the time of a test.
        host = {**device.target["host"], "opt-level": 0}
        device = replace(device, target={**device.target, "host": host})
        with relax_cases.on(device):
            yield device


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_numbers_are_numpys(gpu: Device, name: str) -> None:
    in_relax, in_numpy, shapes = CASES[name]
    arrays = [array(*shape) for shape in shapes]
    (got,) = relax_cases.run(in_relax, *arrays)
    relax_cases.close(got, np.asarray(in_numpy(*(a.astype("float64") for a in arrays))))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Convolution(2, 3, 32, 1, (17, 17), (3, 3), (2, 2), (1, 1), (1, 1, 1, 1)), id="first layer"),
        pytest.param(Convolution(2, 24, 40, 1, (7, 7), (1, 1), (1, 1), (1, 1), (0, 0, 0, 0)), id="pointwise, 7x7"),
        pytest.param(Convolution(2, 40, 24, 1, (8, 8), (1, 1), (1, 1), (1, 1), (0, 0, 0, 0)), id="pointwise, 8x8"),
        pytest.param(Convolution(2, 8, 16, 1, (9, 7), (1, 1), (2, 2), (1, 1), (0, 0, 0, 0)), id="pointwise, stride 2"),
        pytest.param(Convolution(1, 16, 16, 1, (14, 14), (3, 3), (1, 1), (1, 1), (0, 0, 1, 1)), id="3x3"),
        pytest.param(Convolution(1, 8, 8, 3, (9, 9), (3, 3), (1, 1), (2, 2), (2, 2, 2, 2)), id="groups, dilated"),
        pytest.param(Convolution(2, 1, 1, 24, (15, 13), (3, 3), (2, 2), (1, 1), (1, 1, 1, 1)), id="depthwise, stride 2"),
    ],
)
def test_convolutions_and_their_gradients(gpu: Device, case: Convolution) -> None:
    check_convolution(case)


@pytest.mark.slow
def test_any_convolution(gpu: Device) -> None:
    few_examples(given(convolutions)(check_convolution))()


# A whole step.


def network() -> nn.Module:
    """A little of everything: a strided convolution, BatchNorm, depthwise, pointwise, pooling, Dropout, a classifier."""
    torch.manual_seed(0)
    head = (nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, 10))
    first = (nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
    return nn.Sequential(*first, nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 16, 1), nn.ReLU(), *head)


def batch(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.random.default_rng(seed)
    return numbers.standard_normal((4, 3, 16, 16)).astype("float32"), numbers.integers(0, 10, 4)


@functools.cache
def graph() -> tt.TrainGraph:
    x, y = (torch.from_numpy(a) for a in batch())
    return tt.trace(network(), x, y, optimizer=tt.SGD(lr=0.1, momentum=0.9, weight_decay=1e-4, clip_norm=2.0))


def assert_same_state(ours: tt.TrainStep, theirs: tt.TrainStep) -> None:
    ours_now, theirs_now = ours.state_dict(), theirs.state_dict()
    for name, value in theirs_now.items():
        relax_cases.close(ours_now[name].astype("float64"), value.astype("float64"))


def test_a_step_on_the_gpu_is_the_step_on_the_processor(gpu: Device, tmp_path: Path) -> None:
    """Losses, parameters, buffers, momentum and Dropout's random numbers, over steps and a restart from a file."""
    tt.build(graph(), gpu).save(tmp_path / "step")
    ours, theirs = tt.load(tmp_path / "step"), tt.build(graph(), quick_device()).load()
    assert b"__global__" not in (tmp_path / "step" / artifact.LIBRARY).read_bytes(), "CUDA source instead of machine code"
    for seed in range(3):
        assert ours(*batch(seed)) == pytest.approx(theirs(*batch(seed)), rel=1e-4)
    assert_same_state(ours, theirs)
    ours.save(tmp_path / "now.safetensors")
    loss = ours(*batch(3))
    ours.restore(tmp_path / "now.safetensors")
    assert ours(*batch(3)) == loss == pytest.approx(theirs(*batch(3)), rel=1e-4)
    x, y = batch(4)
    relax_cases.close(ours.predict(x[:3]), theirs.predict(x[:3]))
    ours.load_state_dict(theirs.state_dict())
    assert_same_state(ours, theirs)
    assert {str(tensor.device).split(":")[0] for tensor in ours._moment.tensors.values()} == {"cuda"}
    assert ours.evaluate(x, y) == pytest.approx(theirs.evaluate(x, y), rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [pytest.param(None, marks=pytest.mark.slow), {"filter": 2}, {"weight": 0.5, "select": "random"}],
    ids=["dense", "filtered", "sparse"],
)
def test_a_step_on_the_gpu_is_pytorchs(gpu: Device, options: dict | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs, losses, all gradients, statistics and parameters after three steps; filtered ones by the paper's equations."""
    monkeypatch.setattr(targets, "load", lambda _: gpu)
    plan = None if options is None else tt.UpdatePlan.last(graph().layers, 2, **options)
    x, y = (torch.from_numpy(a) for a in batch())
    rule = tt.SGD(lr=0.1, momentum=0.9, weight_decay=1e-4, clip_norm=2.0)
    report = verify.verify(network(), x, y, optimizer=rule, plan=plan, device="cuda", steps=3)
    assert report.passed, report.message
    gradients = {c.name: c.shape for c in report.worst("gradient")}
    assert ("0.weight" in gradients) == (options is None)
    assert gradients["4.weight"] == (16, 4 if options and "weight" in options else 8, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet", "squeezenet", "vit"])
def test_networks(gpu: Device, name: str) -> None:
    check_single(name, models.EXAMPLES[name], training=True, device=gpu)
    check_double(models.EXAMPLES[name], training=True, device=gpu)


def test_without_a_gpu_the_error_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "load_gpu_runtime", lambda: None)
    monkeypatch.setattr(runtime.tvm, "cuda", lambda _: type("Nothing", (), {"exist": False}))
    monkeypatch.setattr(cuda_compiler, "find", lambda *_: cuda_compiler.Compiler("none", "13.0", lambda *_: b"code"))
    with pytest.raises(DeviceError, match=r"NVIDIA GPU .device 'cuda-sm_90'.*libcuda.so.1.*libcudart"):
        tt.build(tt.trace(nn.Linear(3, 2), torch.randn(2, 3), torch.tensor([0, 1])), targets.gpu("sm_90")).load()


# Compilation for every architecture.


def device(name: str) -> Device:
    return targets.gpu(name) if name.startswith("sm_") else targets.load(name)


def families(x: relax.Var, w: relax.Var, d: relax.Var, p: relax.Var) -> relax.Expr:
    """One kernel of each family at least: tiles (with parts and without), shared sums, single sums, sweeps."""
    dense = R.nn.conv2d(x, w, strides=2, padding=1)
    single = R.nn.conv2d(x, d, padding=1, groups=16)
    point = R.nn.conv2d(x, p)
    calls = [(dense, R.nn.relu(dense)), (single, R.nn.relu(single)), (point, R.add(point, R.sum(x, [0, 2, 3], keepdims=True)))]
    gradients = [f(call, g) for call, g in calls for f in (operators.conv2d_dgrad, operators.conv2d_wgrad)]
    return relax.Tuple([*gradients, R.nn.softmax(R.sum(x, [2, 3])), R.permute_dims(x, [0, 2, 3, 1])])


SHAPES = ((4, 16, 16, 16), (24, 16, 3, 3), (16, 1, 3, 3), (16, 16, 1, 1))


def compiler_for(arch: str) -> cuda_compiler.Compiler:
    try:
        return cuda_compiler.find(arch)
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", DEVICES)
def test_every_family_compiles(name: str) -> None:
    compiler_for(str(device(name).gpu))
    lowering.compile_module(relax_cases.module(families, *(array(*shape) for shape in SHAPES)), device(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", DEVICES)
def test_a_whole_network_compiles(name: str) -> None:
    compiler_for(str(device(name).gpu))
    example = models.EXAMPLES["mobilenet_v2"]
    lowering.compile_module(tt.trace(*models.build(example, training=True)).module(), device(name))


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_compiler, "_nvcc", lambda: None)
    monkeypatch.setattr(cuda_compiler, "_nvrtc_libraries", lambda: ())
    with pytest.raises(DeviceError, match="sm_53 is installed: pip install nvidia-cuda-nvrtc-cu12"):
        cuda_compiler.find("sm_53")


def test_a_refused_source_is_an_error_with_the_compilers_words() -> None:
    compiler = compiler_for("sm_87")
    with pytest.raises(DeviceError, match=r"sm_87: .*error.*nonsense"):
        compiler.run("__global__ void kernel() { nonsense; }", "sm_87")


def test_names_that_begin_with_a_digit() -> None:
    assert cuda_compiler.legal_names("f(0_weight_ptr[1], x0_y, 0x0p+0f, 1.5f)") == "f(v0_weight_ptr[1], x0_y, 0x0p+0f, 1.5f)"


def test_machine_code_travels_as_text() -> None:
    code = bytes(range(256))
    assert gpu_code.from_text(gpu_code.to_text(code)) == code
    assert gpu_code.from_text("__global__ void kernel() {}") is None


# The form of kernels.


def kernels_of(make, *shapes: tuple[int, ...]) -> list[str]:
    lowered = lowering.lower(relax_cases.module(make, *(array(*s) for s in shapes)), targets.gpu("sm_87"))
    return [f.script() for f in lowered.functions.values() if isinstance(f, tirx.PrimFunc)]


def test_a_convolution_is_a_product_of_tiles_with_what_follows_in_its_registers() -> None:
    (text,) = kernels_of(lambda x, w, b: R.nn.relu(R.add(R.nn.conv2d(x, w), b)), (8, 64, 16, 16), (64, 64, 1, 1), (1, 64, 1, 1))
    assert text.count('scope="shared"') == 2
    assert text.count('scope="local"') == 1
    assert text.count('thread="blockIdx.x"') == 1, "one kernel"
    assert "T.vectorized(T.int64(4))" in text or "T.vectorized(4)" in text


def test_long_sums_are_shared_by_threads() -> None:
    (text,) = kernels_of(lambda x: R.sum(x, [0, 2, 3]), (8, 24, 14, 14))
    assert "T.axis.reduce" in text
    assert 'thread="threadIdx.x"' in text
    assert 'thread="threadIdx.y"' in text


def test_every_kernel_has_threads() -> None:
    for text in kernels_of(families, *SHAPES):
        assert "thread_binding" in text
