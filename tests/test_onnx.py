"""ONNX files as PyTorch modules: every operator against ONNX's reference implementation, whole networks against PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx_cases import OPSET, assert_same_gradients, floats, gradients, graph_model, images, ints, load, scalar
from torch import nn

from tvmtrain import onnx_model
from tvmtrain.errors import ModelError, UnsupportedOperatorError
from tvmtrain.onnx_model.operators import FOLDED, OPERATORS


@dataclass(frozen=True)
class Case:
    """One node: ``x`` are the graph's inputs, ``w`` the initializers behind them (None: left out)."""

    operator: str
    x: Sequence[np.ndarray]
    w: Sequence[np.ndarray | None] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    opset: int = OPSET
    outputs: int = 1
    expected: Sequence[np.ndarray] | None = None  # where the reference implementation does not know the old form

    def model(self) -> onnx.ModelProto:
        inputs = {f"x{i}": array for i, array in enumerate(self.x)}
        weights = {f"w{i}": array for i, array in enumerate(self.w) if array is not None}
        names = [*inputs, *[f"w{i}" if array is not None else "" for i, array in enumerate(self.w)]]
        outputs = [f"y{i}" for i in range(self.outputs)]
        node = helper.make_node(self.operator, names, outputs, name="node", **self.attributes)
        return graph_model([node], inputs, weights, outputs, self.opset)

    def __str__(self) -> str:
        return f"{self.operator}-{self.opset}-" + "-".join(str(v) for v in self.attributes.values())


def check(
    model: onnx.ModelProto, x: Sequence[np.ndarray], folder: Path, expected: Sequence[np.ndarray] | None = None
) -> nn.Module:
    """The loaded module gives the reference's outputs, as it is and exported."""
    if expected is None:
        names = [value.name for value in model.graph.input]
        expected = ReferenceEvaluator(model).run(None, dict(zip(names, x, strict=False)))
    module = load(model, folder)
    tensors = tuple(torch.tensor(array) for array in x)
    exported = torch.export.export(module, tensors).module()
    for forward in (module, exported):
        got = forward(*tensors)
        for y, wanted in zip(got if isinstance(got, tuple) else (got,), expected, strict=True):
            assert tuple(y.shape) == np.shape(wanted)
            assert y.detach().numpy().dtype == np.asarray(wanted).dtype
            np.testing.assert_allclose(y.detach().numpy(), wanted, rtol=1e-4, atol=2e-5)
    return module


A, B, IMAGE = floats(2, 3, 4), floats(3, 1), floats(2, 4, 7, 6)
POSITIVE = floats(2, 3, 4, low=0.1)
MASK = floats(2, 3, 4) > 0

UNARY = """
    Abs Ceil Cos Erf Exp Floor HardSwish IsNaN Mish Neg Relu
    Round Sigmoid Sign Sin Softplus Softsign Tanh Identity
""".split()  # noqa: SIM905
ARITHMETIC = """
    Add Sub Mul Div Max Min Sum Mean Greater Less Equal
    GreaterOrEqual LessOrEqual
""".split()  # noqa: SIM905
REDUCTIONS = """
    ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSumExp
""".split()  # noqa: SIM905

ELEMENTWISE = [
    *[Case(name, [A]) for name in UNARY],
    *[Case(name, [POSITIVE]) for name in ("Log", "Sqrt", "Reciprocal")],
    *[Case(name, [A, B]) for name in ARITHMETIC],
    *[Case(name, [A], [value]) for name in ARITHMETIC for value in (scalar(0.5), floats(2, 1, 4))],
    Case("Add", [B], [floats(1, 1, 1)]),  # the initializer makes the result larger
    Case("Div", [ints(-7, 7, 5)], [ints(2, 2, -3)]),
    Case("Mod", [ints(-7, 7, 5)], [ints(2, 2, 3)]),
    Case("Mod", [A, POSITIVE], attributes={"fmod": 1}),
    Case("Pow", [POSITIVE], [scalar(2.0)]),
    Case("Pow", [POSITIVE], [np.array([3.0], np.float32)]),
    Case("Pow", [POSITIVE, A]),
    *[Case(name, [MASK, floats(3, 4) > 0]) for name in ("And", "Or", "Xor")],
    Case("Not", [MASK]),
    Case("Where", [MASK, A, B]),
    Case("Where", [MASK, A], [scalar(0.0)]),
    Case("Where", [MASK], [floats(3, 4), scalar(1.0)]),
    Case("Cast", [A], attributes={"to": TensorProto.INT32}),
    Case("Cast", [A], attributes={"to": TensorProto.BOOL}),
    Case("CastLike", [A, ints(1)]),
    Case("LeakyRelu", [A], attributes={"alpha": 0.2}),
    Case("PRelu", [IMAGE], [floats(4, 1, 1)]),
    Case("PRelu", [IMAGE], [floats(1)]),
    Case("PRelu", [IMAGE], [floats(6)]),
    Case("Elu", [A], attributes={"alpha": 0.7}),
    Case("Celu", [A], attributes={"alpha": 0.7}),
    Case("Selu", [A]),
    Case("Selu", [A], attributes={"alpha": 1.2, "gamma": 0.9}),
    Case("HardSigmoid", [A]),
    Case("HardSigmoid", [A], attributes={"alpha": 1 / 6}),
    Case("Gelu", [A]),
    Case("Gelu", [A], attributes={"approximate": "tanh"}),
    Case("Swish", [A], opset=24),
    Case("Swish", [A], attributes={"alpha": 1.5}, opset=24),
    Case("Clip", [A], [scalar(0.0)]),
    Case("Clip", [4 * A], [scalar(0.0), scalar(6.0)]),
    Case("Clip", [A], [None, scalar(0.5)]),
    Case("Clip", [A], [np.array(-0.5, np.float32), np.array(0.5, np.float32)]),
    Case("Clip", [A]),
    Case("Clip", [A], attributes={"min": 0.0}, opset=7, expected=[np.maximum(A, 0)]),
    Case("Clip", [A], attributes={"min": -1.0, "max": 1.0}, opset=10),
    *[Case(name, [A], attributes={"axis": axis}) for name in ("Softmax", "LogSoftmax") for axis in (1, -1)],
    *[Case("Softmax", [A], opset=11, expected=[np.exp(A) / np.exp(A).sum((1, 2), keepdims=True)])],
    Case("Softmax", [A], attributes={"axis": 2}, opset=9),
    Case("Dropout", [A]),
    Case("Dropout", [A], attributes={"ratio": 0.3}, opset=7, expected=[A]),
]

STATISTICS = [floats(4), floats(4), floats(4), floats(4, low=0.5)]
GAMMA, BETA, MEAN, VARIANCE = (array.reshape(4, 1, 1) for array in STATISTICS)
NORMAL = (IMAGE - MEAN) / np.sqrt(VARIANCE + 1e-2) * GAMMA + BETA

LINEAR = [
    Case("MatMul", [A], [floats(2, 4, 5)]),
    Case("MatMul", [A, floats(4, 5)]),
    Case("Gemm", [floats(3, 4)], [floats(5, 4), floats(5)], {"transB": 1}),
    Case("Gemm", [floats(3, 4)], [floats(4, 5)]),
    Case("Gemm", [floats(4, 3)], [floats(4, 5), floats(3, 1)], {"transA": 1, "alpha": 0.5, "beta": 2.0}),
    Case("Einsum", [A], [floats(2, 4, 5)], {"equation": "bij,bjk->bik"}),
    Case("BatchNormalization", [IMAGE], STATISTICS),
    Case("BatchNormalization", [IMAGE], STATISTICS, {"epsilon": 1e-2}, opset=9, expected=[NORMAL]),
    Case("InstanceNormalization", [IMAGE], [floats(4), floats(4)]),
    Case("LayerNormalization", [A], [floats(4), floats(4)], {"epsilon": 1e-3}),
    Case("LayerNormalization", [A], [floats(3, 4)], {"axis": 1}),
    Case("LayerNormalization", [A], [floats(1), floats(1)]),
    Case("RMSNormalization", [A], [floats(4)], opset=23),
    Case("GroupNormalization", [IMAGE], [floats(4), floats(4)], {"num_groups": 2}),
    Case("Attention", [floats(2, 2, 3, 4), floats(2, 2, 5, 4), floats(2, 2, 5, 4)], opset=23),
    Case("Attention", [floats(2, 4, 3, 4), floats(2, 2, 3, 4), floats(2, 2, 3, 4)], attributes={"is_causal": 1}, opset=23),
    Case(
        "Attention",
        [floats(2, 3, 8), floats(2, 5, 8), floats(2, 5, 8), floats(3, 5)],
        attributes={"q_num_heads": 2, "kv_num_heads": 2, "scale": 0.3},
        opset=23,
    ),
]

T2, T1 = floats(4, 3, 3, 3), floats(4, 3, 3)
TRANSPOSED = F.conv_transpose2d(torch.tensor(IMAGE), torch.tensor(T2), stride=2).numpy()
SEQUENCE = floats(2, 4, 5)
TRANSPOSED_GROUPS = F.conv_transpose1d(torch.tensor(SEQUENCE), torch.tensor(T1), groups=2, dilation=2).numpy()
W2, WD = floats(6, 4, 3, 3), floats(4, 1, 3, 2)
RESIZE = [{"mode": m, "coordinate_transformation_mode": c} for m in ("nearest", "linear") for c in (
    "half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "half_pixel_symmetric")]  # fmt: skip
SCALES = np.array([1, 1, 2, 3], np.float32)

WINDOWS = [
    Case("Conv", [IMAGE], [W2, floats(6)], {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
    Case("Conv", [IMAGE], [W2], {"pads": [2, 2, 2, 2], "dilations": [2, 2]}),
    Case("Conv", [IMAGE], [WD, floats(4)], {"group": 4, "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    Case("Conv", [IMAGE], [WD], {"group": 4, "auto_pad": "SAME_LOWER"}),
    Case("Conv", [IMAGE], [W2], {"auto_pad": "VALID"}),
    Case("Conv", [floats(2, 4, 9)], [floats(6, 2, 3)], {"group": 2, "pads": [1, 1]}),
    Case("Conv", [floats(1, 2, 4, 5, 6)], [floats(3, 2, 2, 2, 2)]),
    Case("ConvTranspose", [IMAGE], [T2, floats(3)], {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    Case("ConvTranspose", [IMAGE], [T2], {"strides": [2, 3], "output_padding": [1, 2], "pads": [0, 1, 1, 0]}),
    Case("ConvTranspose", [IMAGE], [T2], {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    Case("ConvTranspose", [IMAGE], [T2], {"strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    Case("ConvTranspose", [IMAGE], [T2], {"strides": [2, 2], "output_shape": [14, 12]}, expected=[TRANSPOSED[:, :, 1:, 1:]]),
    Case("ConvTranspose", [SEQUENCE], [T1], {"group": 2, "dilations": [2]}, expected=[TRANSPOSED_GROUPS]),
    Case("MaxPool", [IMAGE], attributes={"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 0]}),
    Case("MaxPool", [IMAGE], attributes={"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    Case("MaxPool", [IMAGE], attributes={"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]}),
    Case("MaxPool", [IMAGE], attributes={"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    Case("MaxPool", [IMAGE], attributes={"kernel_shape": [2, 2], "dilations": [2, 2]}),
    Case("AveragePool", [IMAGE], attributes={"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    Case("AveragePool", [IMAGE], attributes={"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    Case("AveragePool", [IMAGE], attributes={"kernel_shape": [3, 3], "pads": [0, 1, 1, 2], "count_include_pad": 0}),
    Case("AveragePool", [IMAGE], attributes={"kernel_shape": [3, 3], "pads": [0, 1, 1, 2], "count_include_pad": 1}),
    Case("AveragePool", [IMAGE], attributes={"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    Case("AveragePool", [IMAGE], attributes={"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    Case("GlobalAveragePool", [IMAGE]),
    Case("GlobalMaxPool", [IMAGE]),
    *[Case("Resize", [IMAGE], [None, SCALES], attributes) for attributes in RESIZE],
    *[Case("Resize", [IMAGE], [None, None, ints(2, 4, 5, 9)], attributes) for attributes in RESIZE],
    *[
        Case("Resize", [IMAGE], [None, None, ints(5, 9)], {"axes": [2, 3], "nearest_mode": mode})
        for mode in ("round_prefer_ceil", "floor", "ceil")
    ],
    Case("Resize", [IMAGE], [np.zeros(0, np.float32), SCALES], {"mode": "cubic"}),
    Case("Resize", [IMAGE], [None, np.array([1, 1, 1.7, 0.6], np.float32)], {"mode": "linear"}),
    Case("Resize", [A], [None, None, ints(2, 6, 4)], {"mode": "linear"}),
    Case("Resize", [IMAGE], [SCALES], {"mode": "nearest"}, opset=10, expected=[IMAGE.repeat(2, 2).repeat(3, 3)]),
    Case("Upsample", [IMAGE], [SCALES], opset=9, expected=[IMAGE.repeat(2, 2).repeat(3, 3)]),
    Case("Upsample", [IMAGE], attributes={"scales": [1.0, 1.0, 2.0, 3.0]}, opset=7, expected=[IMAGE.repeat(2, 2).repeat(3, 3)]),
    Case("DepthToSpace", [floats(2, 8, 3, 2)], attributes={"blocksize": 2}),
    Case("DepthToSpace", [floats(2, 8, 3, 2)], attributes={"blocksize": 2, "mode": "CRD"}),
    Case("SpaceToDepth", [floats(2, 2, 4, 6)], attributes={"blocksize": 2}),
]

SHAPES = [
    *[Case("Flatten", [A], attributes={"axis": axis}) for axis in (0, 1, 2, -1)],
    Case("Reshape", [A], [ints(0, -1)]),
    Case("Reshape", [A], [ints(4, 6)], {"allowzero": 1}),
    Case("Transpose", [A], attributes={"perm": [2, 0, 1]}),
    Case("Transpose", [A]),
    Case("Squeeze", [floats(1, 3, 1)], [ints(0)]),
    Case("Squeeze", [floats(1, 3, 1)]),
    Case("Squeeze", [floats(1, 3, 1)], attributes={"axes": [2]}, opset=11),
    Case("Unsqueeze", [A], [ints(-1, 1)]),
    Case("Unsqueeze", [A], attributes={"axes": [0, 3]}, opset=11),
    Case("Concat", [A, floats(2, 1, 4)], [floats(2, 5, 4)], {"axis": 1}),
    Case("Split", [A], [ints(1, 3)], {"axis": 2}, outputs=2),
    Case("Split", [A], attributes={"axis": -1, "num_outputs": 3}, outputs=3),
    Case("Split", [A], attributes={"axis": 2}, opset=11, outputs=2),
    Case("Split", [A], attributes={"axis": 2, "split": [3, 1]}, opset=11, outputs=2),
    Case("Slice", [IMAGE], [ints(1, -3), ints(3, 2**62), ints(1, -1)]),
    Case("Slice", [IMAGE], [ints(5, -1), ints(0, -(2**62)), ints(2, 3), ints(-2, -1)]),
    Case("Slice", [IMAGE], [ints(0, 1), ints(2, 4)]),
    Case("Slice", [IMAGE], attributes={"starts": [1], "ends": [-1], "axes": [3]}, opset=9),
    Case("Gather", [A], [np.array(1)], {"axis": 1}),
    Case("Gather", [A], [ints(0, -1, 1)], {"axis": 2}),
    Case("GatherElements", [A], [ints(0, -1, 1, 2, 2, 2, 0, 1).reshape(2, 1, 4)], {"axis": 1}),
    Case("Expand", [B], [ints(2, 1, 4)]),
    Case("Tile", [A], [ints(1, 2, 3)]),
    Case("Pad", [IMAGE], [ints(0, 0, 1, 2, 0, 1, 0, 3), scalar(1.5)]),
    Case("Pad", [IMAGE], [ints(0, 0, -1, 2, 0, 0, 0, -3)], expected=[np.pad(IMAGE[:, :, 1:, :3], [(0, 0)] * 3 + [(2, 0)])]),
    Case("Pad", [IMAGE], [ints(0, 0, 1, 2, 0, 0, 0, 3)], {"mode": "reflect"}),
    Case("Pad", [IMAGE], [ints(1, 2), None, ints(-1)], {"mode": "edge"}),
    Case("Pad", [IMAGE], [ints(1, 2), None, ints(3)], {"mode": "wrap"}),
    Case("Pad", [IMAGE], attributes={"pads": [0, 0, 1, 1, 0, 0, 0, 0], "value": 2.0}, opset=10),
    Case("Trilu", [A]),
    Case("Trilu", [A], [np.array(-1)], {"upper": 0}),
    Case("CumSum", [A], [np.array(1)]),
    Case("CumSum", [A], [np.array(-1)], {"exclusive": 1, "reverse": 1}),
    *[Case(name, [A], attributes={"axis": 1, "keepdims": k}) for name, k in (("ArgMax", 0), ("ArgMin", 1))],
    *[Case(name, [POSITIVE], [ints(0, -1)], {"keepdims": 0}) for name in (*REDUCTIONS, "ReduceLogSum")],
    *[Case(name, [A], attributes={"axes": [1]}, opset=11) for name in REDUCTIONS],
    Case("ReduceMean", [A]),
    Case("ReduceSum", [A], [np.zeros(0, np.int64)], {"noop_with_empty_axes": 1}),
]


@pytest.mark.parametrize("case", [*ELEMENTWISE, *LINEAR, *WINDOWS, *SHAPES], ids=str)
def test_operator_matches_the_reference(case: Case, tmp_path: Path) -> None:
    check(case.model(), case.x, tmp_path, case.expected)


def test_every_operator_of_the_table_is_tested() -> None:
    tested = {case.operator for case in (*ELEMENTWISE, *LINEAR, *WINDOWS, *SHAPES)}
    elsewhere = {"Shape", "Size", "SequenceAt", "SplitToSequence"}  # their results are static or lists: tested in graphs below
    assert OPERATORS.keys() == (tested | elsewhere) - {"Identity"}
    assert not OPERATORS.keys() & FOLDED


# --- windows of every shape ----------------------------------------------------------------------------------

PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))
SMALL_PAIR = st.tuples(st.integers(1, 2), st.integers(1, 2))


def pads(largest: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, largest), min_size=4, max_size=4)


CONVOLUTIONS = st.fixed_dictionaries(
    {"kernel_shape": PAIR, "strides": PAIR, "dilations": SMALL_PAIR, "group": st.sampled_from([1, 2, 4])},
)
PADDINGS = st.one_of(
    st.fixed_dictionaries({"pads": pads(2)}),
    st.fixed_dictionaries({"auto_pad": st.sampled_from(["SAME_UPPER", "SAME_LOWER", "VALID"])}),
)
POOLS = st.fixed_dictionaries(
    {
        "kernel_shape": st.tuples(st.integers(2, 3), st.integers(2, 3)),
        "strides": PAIR,
        "pads": pads(1),
        "ceil_mode": st.integers(0, 1),
    }
)


@settings(deadline=None, max_examples=25)
@given(window=CONVOLUTIONS, padding=PADDINGS)
def test_convolution_of_any_window(tmp_path_factory: Any, window: dict, padding: dict) -> None:
    case = Case("Conv", [IMAGE], [floats(4, 4 // window["group"], *window["kernel_shape"])], window | padding)
    check(case.model(), case.x, tmp_path_factory.mktemp("conv"))


def pooled(x: np.ndarray, window: Mapping[str, Any], mode: str) -> np.ndarray:
    """Pooling by its definition; ``mode`` is max, average or average with the padding counted."""
    kernel, strides, begin, end = window["kernel_shape"], window["strides"], window["pads"][:2], window["pads"][2:]
    sizes = []
    for n, k, s, p, q in zip(x.shape[2:], kernel, strides, begin, end, strict=True):
        size = int((np.ceil if window["ceil_mode"] else np.floor)((n + p + q - k) / s)) + 1
        sizes.append(size - 1 if (size - 1) * s >= n + p else size)
    y = np.zeros((*x.shape[:2], *sizes), np.float32)
    for i, j in np.ndindex(*sizes):
        h, w = i * strides[0] - begin[0], j * strides[1] - begin[1]
        taps = x[:, :, max(h, 0) : h + kernel[0], max(w, 0) : w + kernel[1]]
        bounds = (min(h + kernel[0], x.shape[2] + end[0]) - h) * (min(w + kernel[1], x.shape[3] + end[1]) - w)
        count = bounds if mode == "padded" else taps.shape[2] * taps.shape[3]
        y[:, :, i, j] = taps.max((2, 3)) if mode == "max" else taps.sum((2, 3)) / count
    return y


@settings(deadline=None, max_examples=40)
@given(window=POOLS, mode=st.sampled_from(["max", "average", "padded"]))
def test_pooling_of_any_window(tmp_path_factory: Any, window: dict, mode: str) -> None:
    counted = {"count_include_pad": 1} if mode == "padded" else {}
    case = Case("MaxPool" if mode == "max" else "AveragePool", [IMAGE], attributes=window | counted)
    check(case.model(), case.x, tmp_path_factory.mktemp("pool"), [pooled(IMAGE, window, mode)])


# --- graphs --------------------------------------------------------------------------------------------------


def test_shape_arithmetic_is_static(tmp_path: Path) -> None:
    """Flattening as exporters write it, and a mask from Range: neither leaves an operator on shapes in the exported graph."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["batch"]),
        helper.make_node("Unsqueeze", ["batch", "axis"], ["row"]),
        helper.make_node("Concat", ["row", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["flat"]),
        helper.make_node("Size", ["x"], ["count"]),
        helper.make_node("Div", ["count", "batch"], ["columns"]),
        helper.make_node("Range", ["zero", "columns", "one"], ["ramp"]),
        helper.make_node("Cast", ["ramp"], ["slope"], to=TensorProto.FLOAT),
        helper.make_node(
            "ConstantOfShape", ["rest"], ["nothing"], value=helper.make_tensor("v", TensorProto.FLOAT, [1], [0.5])
        ),
        helper.make_node("Mul", ["flat", "slope"], ["sloped"]),
        helper.make_node("Add", ["sloped", "shift"], ["y"]),
        helper.make_node("Constant", [], ["shift"], value_float=0.5),
    ]
    nodes.insert(0, nodes.pop())
    constants = {"zero": np.array(0), "one": np.array(1), "axis": ints(0), "rest": ints(12)}
    module = check(graph_model(nodes, {"x": A}, constants, ["y"]), [A], tmp_path)
    assert not list(module.named_parameters())
    exported = torch.export.export(module, (torch.tensor(A),))
    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert called == ["aten.reshape.default", "aten.lift_fresh_copy.default", "aten.mul.Tensor", "aten.add.Tensor"]


def test_the_batch_is_that_of_the_example(tmp_path: Path) -> None:
    nodes = [helper.make_node("Flatten", ["x"], ["flat"]), helper.make_node("Gemm", ["flat", "w"], ["y"])]
    module = load(graph_model(nodes, {"x": floats(1, 3, 4)}, {"w": floats(12, 5)}, ["y"]), tmp_path)
    assert module(torch.zeros(7, 3, 4)).shape == (7, 5)


def test_sequences(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("SplitToSequence", ["x", "sizes"], ["parts"], axis=2),
        helper.make_node("SequenceAt", ["parts", "last"], ["y"]),
    ]
    check(graph_model(nodes, {"x": A}, {"sizes": ints(1, 3), "last": np.array(-1)}, ["y"]), [A], tmp_path)


def test_gather_from_a_table_is_an_embedding(tmp_path: Path) -> None:
    node = helper.make_node("Gather", ["table.weight", "tokens"], ["y"])
    tokens, table = ints(3, 0, 3).reshape(1, 3), floats(5, 4)
    module = check(graph_model([node], {"tokens": tokens}, {"table.weight": table}, ["y"]), [tokens], tmp_path)
    module(torch.tensor(tokens)).sum().backward()
    assert module.get_parameter("table.weight").grad.sum(1).tolist() == [4, 0, 0, 8, 0]


def test_initializers_are_sorted_into_parameters_buffers_and_constants(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("BatchNormalization", ["x", "bn.weight", "bn.bias", "bn.mean", "bn.var"], ["a"]),
        helper.make_node("Mul", ["a", "scalar"], ["b"]),
        helper.make_node("Pow", ["b", "power"], ["c"]),
        helper.make_node("Resize", ["c", "", "scales"], ["d"]),
        helper.make_node("Concat", ["low", "low"], ["lows"], axis=0),
        helper.make_node("ReduceMin", ["lows"], ["lowest"], keepdims=0),
        helper.make_node("Clip", ["d", "lowest"], ["e"]),
        helper.make_node("Identity", ["gain"], ["same gain"]),
        helper.make_node("Mul", ["e", "gain"], ["f"]),
        helper.make_node("Add", ["f", "same gain"], ["y"]),
    ]
    weights = {
        "bn.weight": floats(4), "bn.bias": floats(4), "bn.mean": floats(4), "bn.var": floats(4, low=0.5), "scalar": scalar(2.0),
        "power": np.array([2.0], np.float32), "scales": SCALES, "low": np.array([0.1], np.float32), "gain": floats(4, 1, 1),
        "unused": floats(3),
    }  # fmt: skip
    module = check(graph_model(nodes, {"x": IMAGE}, weights, ["y"]), [IMAGE], tmp_path)
    assert [name for name, _ in module.named_parameters()] == ["gain", "bn.weight", "bn.bias"]
    assert [name for name, _ in module.named_buffers()] == ["bn.mean", "bn.var"]
    assert module.training


def test_names_that_pytorch_refuses_are_made_valid_and_unique(tmp_path: Path) -> None:
    names = ["W_12", "a.0.weight", "a.0", "forward", "x/y:0", "x_y_0", "a..b", "names.w", "block.training"]
    nodes = [helper.make_node("Sum", ["x", *names], ["y"])]
    module = check(graph_model(nodes, {"x": A}, {name: floats(3, 4) for name in names}, ["y"]), [A], tmp_path)
    valid = ["W_12", "a.0.weight", "a.0_", "forward_", "x_y_0", "x_y_0_", "a._.b", "names_.w", "block.training_"]
    assert module.names == dict(zip(names, valid, strict=True))
    assert {name for name, _ in module.named_parameters()} == set(valid)


@pytest.mark.parametrize("opset", [9, 13, 14, 21])
def test_batch_norm_in_training_form(tmp_path: Path, opset: int) -> None:
    """As nn.BatchNorm2d, in both modes; the statistics are buffers, not outputs."""
    side = ["mean'", "var'"] if opset >= 14 else ["mean'", "var'", "saved mean", "saved var"]
    attributes = {"momentum": 0.7, **({"training_mode": 1} if opset >= 14 else {})}
    node = helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["y", *side], **attributes)
    weights = dict(zip("sbmv", STATISTICS, strict=True))
    module = load(graph_model([node], {"x": IMAGE}, weights, ["y", "mean'"], opset), tmp_path)
    ours = nn.BatchNorm2d(4, momentum=0.3)
    names = {"weight": "s", "bias": "b", "running_mean": "m", "running_var": "v"}
    ours.load_state_dict({name: torch.tensor(weights[key]) for name, key in names.items()}, strict=False)
    x = torch.tensor(IMAGE)
    exported = torch.export.export(module, (x,)).run_decompositions()
    assert set(exported.graph_signature.buffers_to_mutate.values()) == {"m", "v"}
    for mode in (True, False):
        torch.testing.assert_close(module.train(mode)(x), ours.train(mode)(x))
    torch.testing.assert_close(module.get_buffer("m"), ours.running_mean)
    torch.testing.assert_close(module.get_buffer("v"), ours.running_var)


def dropout_model(opset: int, mode: bool | None) -> onnx.ModelProto:
    """Dropout behind a BatchNormalization whose form says what the file was exported for, where Dropout cannot."""
    side = ["mean'", "var'", "saved mean", "saved var"] if mode and opset < 12 else []
    nodes = [helper.make_node("BatchNormalization", ["x", "s", "b", "m", "v"], ["a", *side])]
    flag = {} if opset < 12 or mode is None else {"mode": np.array(mode)}
    nodes.append(helper.make_node("Dropout", ["a", *(["", "mode"] if flag else [])], ["y"]))
    return graph_model(nodes, {"x": IMAGE}, dict(zip("sbmv", STATISTICS, strict=True)) | flag, ["y"], opset)


@pytest.mark.parametrize(("opset", "mode"), [(21, True), (21, False), (21, None), (11, True), (11, False)])
def test_dropout_drops_where_the_file_asks_for_training(tmp_path: Path, opset: int, mode: bool | None) -> None:
    module, x = load(dropout_model(opset, mode), tmp_path), torch.tensor(IMAGE)
    dropped = float((module(x) == 0).float().mean())
    assert 0.3 < dropped < 0.7 if mode else dropped == 0
    assert (module.eval()(x) != 0).all()


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    body = [helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Add", ["b", "c"], ["d"])]
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("mine", 1)]
    function = helper.make_function("mine", "ReluAdd", ["a", "c"], ["d"], body, opsets[:1])
    model = graph_model([helper.make_node("ReluAdd", ["x", "w"], ["y"], domain="mine")], {"x": A}, {"w": floats(3, 4)}, ["y"])
    model.opset_import.append(opsets[1])
    model.functions.append(function)
    check(model, [A], tmp_path)


def test_weights_in_an_external_file(tmp_path: Path) -> None:
    model = graph_model([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": A}, {"w": floats(4, 50)}, ["y"])
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert onnx_model.load(path)(torch.tensor(A)).shape == (2, 3, 50)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"weights\.bin"):
        onnx_model.load(path)


# --- errors --------------------------------------------------------------------------------------------------


def test_all_unsupported_operators_are_in_one_error(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("NonMaxSuppression", ["x", "x"], ["a"], name="boxes"),
        helper.make_node("Relu", ["x"], ["b"]),
        helper.make_node("FusedConv", ["b"], ["c"], domain="com.microsoft"),
        helper.make_node("NoSuchOperator", ["c"], ["y"], name="odd"),
    ]
    with pytest.raises(UnsupportedOperatorError) as caught:
        load(graph_model(nodes, {"x": A}, {}, ["y"]), tmp_path)
    assert "3 nodes" in str(caught.value)
    for place in ("'boxes' (NonMaxSuppression)", "'c' (com.microsoft::FusedConv)", "'odd' (NoSuchOperator)"):
        assert place in str(caught.value)


def damaged(model: onnx.ModelProto) -> dict[str, bytes]:
    whole = model.SerializeToString()
    model.graph.node[0].input[0] = "nowhere"
    return {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "noise": b"not ONNX at all",
        "dangling": model.SerializeToString(),
    }


@pytest.mark.parametrize("damage", ["empty", "truncated", "noise", "dangling"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    model = graph_model([helper.make_node("Add", ["x", "w"], ["y"])], {"x": A}, {"w": floats(3, 4)}, ["y"])
    path = tmp_path / "broken.onnx"
    path.write_bytes(damaged(model)[damage])
    with pytest.raises(ModelError, match=r"broken\.onnx"):
        onnx_model.load(path)


def test_a_missing_file_and_an_old_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such ONNX file"):
        onnx_model.load(tmp_path / "missing.onnx")
    with pytest.raises(ModelError, match="operator set 6"):
        load(graph_model([helper.make_node("Relu", ["x"], ["y"])], {"x": A}, {}, ["y"], opset=6), tmp_path)


ERRORS = {
    "shape from values": (Case("Reshape", [A, ints(6, 4)]), "its shape depends on the values"),
    "wrong batch": (Case("Reshape", [A], [ints(1, 5)]), r"'node' \(Reshape\) with operands of shapes \[2, 3, 4\]"),
    "range": (Case("Range", [scalar(0.0), scalar(2.0), scalar(1.0)]), "shapes are static"),
    "bound": (Case("Clip", [A, scalar(1.0)]), "a constant with one element"),
    "cast": (Case("Cast", [A], attributes={"to": TensorProto.UINT16}), "a cast to UINT16"),
    "last": (Case("ArgMax", [A], attributes={"select_last_index": 1}), "select_last_index"),
    "crop": (
        Case("Resize", [IMAGE], [floats(8), SCALES], {"coordinate_transformation_mode": "tf_crop_and_resize"}),
        "tf_crop_and_resize",
    ),
    "antialias": (Case("Resize", [IMAGE], [None, SCALES], {"mode": "linear", "antialias": 1}), "antialias"),
    "cubic": (Case("Resize", [IMAGE], [None, SCALES], {"mode": "cubic", "cubic_coeff_a": -0.5}), "cubic"),
    "dilated": (Case("AveragePool", [IMAGE], attributes={"kernel_shape": [2, 2], "dilations": [2, 2]}), "dilated"),
    "large": (Case("ConvTranspose", [IMAGE], [T2], {"output_shape": [30, 30]}), "output_shape"),
    "spatial": (Case("BatchNormalization", [IMAGE], STATISTICS, {"spatial": 0}, opset=7), "spatial=0"),
    "softcap": (Case("Attention", [floats(1, 1, 2, 4)] * 3, attributes={"softcap": 2.0}, opset=23), "softcap"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_imported_says_where_and_why(tmp_path: Path, name: str) -> None:
    case, message = ERRORS[name]
    module = load(case.model(), tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        module(*[torch.tensor(array) for array in case.x])
    assert "'node'" in str(caught.value)


def test_a_type_that_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    model = graph_model([helper.make_node("Add", ["x", "w"], ["y"])], {"x": A}, {}, ["y"])
    model.graph.initializer.append(helper.make_tensor("w", TensorProto.BFLOAT16, [1], [1.0]))
    with pytest.raises(ModelError, match="'w': type BFLOAT16"):
        load(model, tmp_path)


def test_the_number_of_inputs_is_checked(tmp_path: Path) -> None:
    module = load(Case("Add", [A, B]).model(), tmp_path)
    with pytest.raises(ModelError, match=r"takes 2 inputs \(x0, x1\), got 1"):
        module(torch.tensor(A))


class Small(nn.Module):
    """A network with every layer that has a training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(F.relu6(self.norm(self.conv(x))).mean((2, 3))))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("opset", [11, 17])
def test_a_file_exported_for_training_trains_as_in_pytorch(tmp_path: Path, opset: int) -> None:
    """The older exporter's training form: batch statistics, running ones updated, the same dropout from the same seed."""
    torch.manual_seed(0)
    model, path = Small().train(), tmp_path / "small.onnx"
    training = torch.onnx.TrainingMode.TRAINING
    options = {"dynamo": False, "training": training, "do_constant_folding": False, "opset_version": opset}
    torch.onnx.export(model, (torch.zeros(4, 3, 32, 32),), path, **options)
    module = onnx_model.load(path)
    model.load_state_dict(module.state_dict(), strict=False)  # exporting ran the model, and moved its statistics
    wanted, gradient = gradients(model)
    got, ours = gradients(module)
    torch.testing.assert_close(got, wanted)
    assert_same_gradients(ours, gradient)
    torch.testing.assert_close(module.get_buffer("norm.running_var"), model.norm.running_var)
    x = images()
    torch.testing.assert_close(module.eval()(x), model.eval()(x))
