"""ONNX files as PyTorch modules."""

from __future__ import annotations

from tvmtrain.onnx_model.module import load

__all__ = ["load"]
