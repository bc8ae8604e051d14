"""A GPU's machine code as text: what TVM keeps where it would keep CUDA source, which no device could compile."""

from __future__ import annotations

import base64
from functools import cache

from tvmtrain.errors import DeviceError

_MARK = "tvmtrain machine code\n"


def to_text(code: bytes) -> str:
    return _MARK + base64.b64encode(code).decode("ascii")


def from_text(text: str) -> bytes | None:
    """The machine code; None if ``text`` is none, but CUDA source."""
    return base64.b64decode(text.removeprefix(_MARK)) if text.startswith(_MARK) else None


@cache
def teach_tvm() -> None:
    """Where TVM would have CUDA source compiled, it gets the machine code of such a text."""
    # Not before the runtime has seen to it that this import does not bring PyTorch along.
    from tvm_ffi import get_global_func, register_global_func

    hook = "tvm_callback_cuda_compile"
    # A device has no such function.
    compile_source = get_global_func(hook, allow_missing=True) or _no_compiler
    register_global_func(hook, lambda text: from_text(text) or compile_source(text), override=True)


def _no_compiler(_: str) -> bytes:
    raise DeviceError("this is CUDA source, and there is no compiler for it here: build it with tvmtrain, which compiles it")
