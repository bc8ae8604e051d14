"""Devices: what a file says, what is detected, what is refused."""

from __future__ import annotations

import json
import os
import platform

import pytest
from tvm.target import Target

from tvmtrain import features, targets
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
        ({"name": "a", "target": {}, "arch": "x", "cores": 0}, "cores=0"),
        ({"name": "a", "target": {}, "arch": "x", "caches": {"l4": 1}}, "unknown caches .'l4'"),
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
