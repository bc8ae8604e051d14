"""Devices: what a file says, what is detected, what is refused."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
from importlib import resources
from pathlib import Path

import pytest
from tvm.target import Target

import tvmtrain as tt
from tvmtrain import cli, cuda_compiler, describe, features, targets, toolchain
from tvmtrain.errors import DeviceError
from tvmtrain.targets import Device


@pytest.mark.parametrize("name", targets.names())
def test_every_device_makes_a_target(name: str) -> None:
    device = targets.load(name)
    assert device.name == name
    assert device.description
    assert Target(dict(device.target)).kind.name
    assert device.lanes() >= 2


@pytest.mark.parametrize("name", ["raspberry-pi-3b", "raspberry-pi-4b", "raspberry-pi-5"])
def test_a_raspberry_pi_has_four_cores_with_neon(name: str) -> None:
    device = targets.load(name)
    assert (device.arch, device.gpu, device.cores, device.target["num-cores"]) == ("aarch64", None, 4, 4)
    assert (device.lanes(), device.vector_registers) == (4, 32)
    assert device.memory >= 2**30


@pytest.mark.parametrize(
    ("board", "mcpu", "arch", "toolkit"),
    [
        ("nano", "cortex-a57", "sm_53", "10.2"),
        ("tx2", "cortex-a57", "sm_62", "10.2"),
        ("xavier-nx", "carmel", "sm_72", "11.4"),
        ("agx-xavier", "carmel", "sm_72", "11.4"),
        ("orin-nano", "cortex-a78ae", "sm_87", "12.6"),
        ("orin-nx", "cortex-a78ae", "sm_87", "12.6"),
        ("agx-orin", "cortex-a78ae", "sm_87", "12.6"),
    ],
)
def test_a_jetson_is_a_gpu_or_its_processor(board: str, mcpu: str, arch: str, toolkit: str) -> None:
    gpu, processor = targets.load(f"jetson-{board}"), targets.load(f"jetson-{board}-cpu")
    assert (gpu.gpu, gpu.cuda_toolkit, gpu.target["host"]["mcpu"]) == (arch, toolkit, mcpu)
    assert (processor.gpu, processor.cuda_toolkit, processor.target["mcpu"]) == (None, "", mcpu)
    same = ("arch", "triple", "memory", "system", "glibc", "libstdcxx")
    assert [getattr(gpu, name) for name in same] == [getattr(processor, name) for name in same]
    assert (processor.lanes(), processor.vector_registers) == (4, 32)


@pytest.mark.parametrize("name", [name for name in targets.names() if name not in ("host", "cuda")])
def test_a_file_tells_all_that_a_bundle_needs(name: str) -> None:
    device = targets.load(name)
    assert device.triple == f"{device.arch}-linux-gnu"
    assert device.glibc
    assert device.libstdcxx
    assert device.system
    assert bool(device.gpu) == bool(device.cuda_toolkit)
    if device.gpu is None:
        assert device.target["num-cores"] == device.cores


@pytest.mark.parametrize("name", targets.names())
def test_a_file_names_its_sources(name: str) -> None:
    text = resources.files(targets).joinpath(f"{name}.toml").read_text()
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert comments
    assert "Source" in text or "sources" in text or name in ("host", "cuda", "aarch64", "x86-64-v3")


def test_host_is_this_machine() -> None:
    device = targets.load("host")
    assert device.arch == platform.machine().lower().replace("amd64", "x86_64").replace("arm64", "aarch64")
    assert 1 <= device.cores <= len(os.sched_getaffinity(0))
    assert device.target["num-cores"] == device.cores
    assert device.memory > 2**28
    assert device.caches.l1 > 0


def test_unknown_name_lists_near_matches() -> None:
    with pytest.raises(DeviceError, match=r"x86-64-v4.*did you mean x86-64-v3"):
        targets.load("x86-64-v4")


def test_plain_values_round_trip_through_json() -> None:
    device = targets.load("x86-64-v3")
    assert Device.from_dict(json.loads(json.dumps(device.to_dict()))) == device


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a", "target": {}, "arch": "x", "speed": 1}, "unknown fields .'speed'"),
        ({"name": "a", "target": {}}, "missing fields .'arch'"),
        ({"name": "a", "target": {"kind": "llvm"}, "arch": "x", "cores": 0}, "cores=0"),
        ({"name": "a", "target": {}, "arch": "x", "caches": {"l4": 1}}, "unknown caches .'l4'"),
        ({"name": "a", "target": {"kind": "llvm"}, "arch": "x", "cores": "4"}, "cores is '4'; want int"),
        ({"name": "a", "target": {"kind": "llvm"}, "arch": "x", "glibc": "new"}, "glibc='new'; want a version"),
        ({"name": "a", "target": {"kind": "cuda", "host": {}}, "arch": "x"}, "target lacks arch"),
        ({"name": "a", "target": {"mcpu": "generic"}, "arch": "x"}, "target lacks kind"),
    ],
)
def test_wrong_descriptions_are_refused(values: dict, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        Device.from_dict(values)


def test_instructions_a_virtual_machine_hides_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("x86 only")
    monkeypatch.setattr(features, "offered", lambda: frozenset({"avx", "avx2", "fma", "f16c"}))
    device = targets.load("host")
    assert device.vector_bits <= 256
    assert not {"-avx", "-avx2", "-fma", "-f16c"} & set(device.target["mattr"])
    assert {"-bmi2", "-popcnt"} <= set(device.target["mattr"])


def test_devices_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "installed", lambda _: iter(()))
    monkeypatch.setattr(cuda_compiler, "_candidates", lambda _: iter(()))
    lines = {line.name: line for line in describe.devices()}
    assert set(lines) == set(targets.names())
    assert not any(line.buildable for line in lines.values())
    assert "apt-get install g++-aarch64-linux-gnu" in lines["raspberry-pi-4b"].missing
    assert "pip install nvidia-cuda-nvrtc-cu12" in lines["jetson-tx2"].missing
    assert "install g++ " in lines["host"].missing


def test_a_gpu_that_is_not_there_is_not_invented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "has_gpu", lambda: False)
    line = describe._device_line("cuda")
    assert line.description == "no NVIDIA GPU found on this machine; builds for sm_75"
    assert line.cores == 0


def test_without_the_compiler_devices_are_listed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_USE_RUNTIME_LIB", "1")
    lines = {line.name: line for line in describe.devices()}
    assert set(lines) == set(targets.names())
    assert lines["jetson-orin-nx"].gpu == "sm_87"
    assert {line.missing for line in lines.values()} == {"install the compiler (pip install 'tvmtrain[compile]')"}


PAGE = (Path(__file__).resolve().parents[1] / "targets" / "README.md").read_text()


def test_the_pages_model_and_plan_fit_each_other() -> None:
    names: dict = {}
    exec(re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)[0], names)
    plan = tt.UpdatePlan.from_toml(re.findall(r"^```toml\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)[0])
    assert set(tt.trace(*names["factory"]()).apply(plan).trained) == {"0.weight", "0.bias", "4.weight", "4.bias"}


def test_the_pages_commands_are_commands() -> None:
    text = PAGE
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    commands = [
        shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.startswith("tvmtrain ")
    ]
    parsed = [cli._parser().parse_args(words[1:]) for words in commands]
    assert {options.device for options in parsed if hasattr(options, "device")} == {
        "host",
        "raspberry-pi-4b",
        "jetson-orin-nano",
    }
    assert {options.command for options in parsed} == {
        "devices",
        "verify",
        "compile",
        "deploy",
        "run",
        "profile",
        "bench",
        "tune",
    }
