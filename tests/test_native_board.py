"""A MobileNetV2 trains on an emulated board, through the runner and without Python: the same numbers as here, up to rounding."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from native_step import built
from safetensors.numpy import load_file, save_file
from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

import tvmtrain as tt
from tvmtrain import deploy, native, targets, toolchain, wheels
from tvmtrain.errors import DeviceError

BOARD = targets.load("raspberry-pi-4b")
SYSTEM = Path("/usr/aarch64-linux-gnu")
EMULATOR = ("qemu-aarch64-static", "-L", str(SYSTEM))
STEPS, BATCH, SIZE, CLASSES = 20, 4, 32, 7
