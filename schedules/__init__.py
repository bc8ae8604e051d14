"""Schedules: how the loops of each kernel run on a device."""

from __future__ import annotations

import tvm
from tvm import tirx

from tvmtrain.schedules import cpu, cuda, records
from tvmtrain.targets import Device

# An attribute of PrimFuncs whose loops are as they shall be: no schedule changes them.
SCHEDULED = "tvmtrain.scheduled"


def apply(mod: tvm.IRModule, device: Device, *, tuned: bool = True) -> tvm.IRModule:
    """``mod`` with every PrimFunc scheduled for ``device``; one that no template fits keeps its plain loops.

    tuned: take the decisions of the device's records for the kernels that they know.
    """
    known = records.load(device) if tuned and not device.gpu else records.Records()
    result = mod.clone()
    for name, function in mod.functions_items():
        if isinstance(function, tirx.PrimFunc) and SCHEDULED not in function.attrs:
            result[name] = (
                cuda.schedule(function, device) if device.gpu else cpu.schedule(function, device, known.decisions(function))
            )
    return result
