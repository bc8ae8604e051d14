"""Schedules: how the loops of each kernel run on a device."""

from __future__ import annotations

import tvm
from tvm import tirx

from tvmtrain.schedules import cpu, cuda
from tvmtrain.targets import Device

# An attribute of PrimFuncs whose loops are as they shall be: no schedule changes them.
SCHEDULED = "tvmtrain.scheduled"


def apply(mod: tvm.IRModule, device: Device) -> tvm.IRModule:
    """``mod`` with every PrimFunc scheduled for ``device``; one that no template fits keeps its plain loops."""
    schedule = cuda.schedule if device.gpu else cpu.schedule
    scheduled = {
        name: schedule(function, device)
        for name, function in mod.functions_items()
        if isinstance(function, tirx.PrimFunc) and SCHEDULED not in function.attrs
    }
    result = mod.clone()
    for name, function in scheduled.items():
        result[name] = function
    return result
