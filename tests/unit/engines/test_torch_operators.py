"""Each operator of the torch backend means what ONNX Runtime takes it to mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from engines.backends.torch import OnnxModule
from engines.backends.torch_operators import OPERATORS
from engines.errors import BackendError

Array = NDArray[Any]

RNG = np.random.default_rng(0)


def floats(*shape: int) -> Array:
    return RNG.standard_normal(shape, dtype=np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


X = floats(2, 6, 4, 4)
FLAT = floats(2, 6)

# operator, its first input, its other inputs (constants; None is left out), attributes
Case = tuple[str, Array, list[Array | None], dict[str, Any]]

CASES: list[Case] = [
    ("Max", X, [floats(2, 6, 4, 4), floats(4)], {}),
    ("ArgMax", np.round(X), [], {"axis": -1, "keepdims": 0}),
    ("ArgMax", np.array([[0, 1, 0, 1], [0, 0, 0, 0]], np.int32), [], {"axis": 1}),
    ("Cast", X, [], {"to": onnx.TensorProto.INT64}),
    ("Cast", np.abs(X), [], {"to": onnx.TensorProto.UINT8}),
    ("Clip", X, [np.array(-0.5, np.float32), np.array(0.5, np.float32)], {}),
    ("Clip", X, [None, np.array(0.5, np.float32)], {}),
    ("Concat", X, [floats(2, 3, 4, 4)], {"axis": 1}),
    ("Conv", X, [floats(8, 6, 3, 3), floats(8)], {"pads": [1, 1, 1, 1], "strides": [2, 2], "kernel_shape": [3, 3]}),
    ("Conv", X, [floats(8, 6, 3, 3)], {"pads": [0, 0, 1, 1], "strides": [2, 2]}),
    ("Conv", X, [floats(6, 3, 1, 1)], {"group": 2}),
    ("CumSum", X, [np.array(-1)], {}),
    ("CumSum", np.ones((2, 3), np.int32), [np.array(1)], {}),
    ("Div", ints(7, -7, 8), [ints(2)], {}),
    ("Equal", ints(1, 2, 3), [ints(2)], {}),
    ("Expand", floats(2, 1, 4), [ints(2, 3, 1)], {}),
    ("Gather", X, [ints(2, -1)], {"axis": 1}),
    ("Gather", X, [np.array(3)], {"axis": -1}),
    ("GatherND", X, [np.array([[0, 1], [1, -1]])], {}),
    ("GatherND", X, [np.array([[0, 1, 3, 2]])], {}),
    ("Gemm", FLAT, [floats(6, 5)], {}),
    ("Gemm", FLAT, [floats(5, 6), floats(5)], {"transB": 1}),
    ("Gemm", FLAT, [floats(2, 5), floats(5)], {"transA": 1, "alpha": 0.5, "beta": 2.0}),
    ("GroupNormalization", X, [floats(6), floats(6)], {"num_groups": 3, "epsilon": 1e-4}),
    ("LayerNormalization", X, [floats(4), floats(4)], {}),
    ("LayerNormalization", X, [floats(4, 4)], {"axis": 2, "epsilon": 1e-3}),
    ("MatMul", X, [floats(4, 5)], {}),
    ("MatMul", X, [floats(2, 6, 4, 3)], {}),
    ("OneHot", ints(1, 0, 3), [np.array(4), np.array([0, 1], np.float32)], {}),
    ("OneHot", ints(1, 0, 3), [np.array(4), np.array([2, 5], np.float32)], {"axis": 0}),
    ("Pad", X, [ints(0, 0, 1, 2, 0, 0, 3, 0)], {}),
    ("Pad", X, [ints(1, 2, -1, 0), np.array(0.5, np.float32), ints(-1, 1)], {}),
    ("Pad", ints(1, 2), [ints(0, 2), np.array(7)], {"mode": "constant"}),
    ("Range", np.array(1), [np.array(7), np.array(2)], {}),
    ("Range", np.array(1, np.float32), [np.array(0, np.float32), np.array(-0.25, np.float32)], {}),
    ("Reshape", X, [ints(0, 3, -1)], {}),
    ("Resize", X, [None, np.array([1, 1, 2, 3], np.float32)], {"mode": "nearest"}),
    (
        "Resize",
        X,
        [None, None, ints(2, 6, 8, 8)],
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    ),
    ("Shape", X, [], {}),
    ("Shape", X, [], {"start": 1, "end": 3}),
    ("Slice", X, [ints(1), ints(2**63 - 1), ints(1), ints(2)], {}),
    ("Slice", X, [ints(0, 0), ints(1, -2)], {}),
    ("Softmax", X, [], {"axis": 1}),
    ("Split", X, [ints(2, 4)], {"axis": 1}),
    ("Split", X, [], {"axis": 1, "num_outputs": 2}),
    ("ReduceMean", floats(2, 3, 4, 5), [ints(1, 3)], {"keepdims": 0}),
    ("ReduceMean", floats(2, 3), [], {}),
    ("Squeeze", floats(2, 1, 3, 1), [], {}),
    ("Squeeze", floats(2, 1, 3, 1), [ints(-1)], {}),
    ("Transpose", X, [], {"perm": [0, 2, 3, 1]}),
    ("Unsqueeze", FLAT, [ints(0, -1)], {}),
    ("Where", X > 0, [X, floats(1)], {}),
]
CASES += [(kind, X, [floats(1, 6, 1, 1)], {}) for kind in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Greater")]
CASES += [
    (kind, X, [], {})
    for kind in ("Neg", "Sin", "Cos", "Exp", "Tanh", "Sigmoid", "Round", "Identity", "Gelu", "Relu")
]
CASES += [(kind, np.abs(X), [], {}) for kind in ("Sqrt", "Log")]


def model_of(kind: str, first: Array, others: list[Array | None], attributes: dict[str, Any]) -> onnx.ModelProto:
    names = ["x"] + [f"c{i}" if other is not None else "" for i, other in enumerate(others)]
    outputs = [f"y{i}" for i in range(2 if kind == "Split" else 1)]
    constants = [numpy_helper.from_array(np.asarray(o), f"c{i}") for i, o in enumerate(others) if o is not None]
    graph = helper.make_graph(
        [helper.make_node(kind, names, outputs, **attributes)],
        "one",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(first.dtype), first.shape)],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize(
    ("kind", "first", "others", "attributes"), CASES, ids=lambda v: v if isinstance(v, str) else ""
)
def test_an_operator_agrees_with_onnxruntime(
    kind: str, first: Array, others: list[Array | None], attributes: dict[str, Any]
) -> None:
    model = model_of(kind, first, others, attributes)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    got = OnnxModule(model)({"x": torch.from_numpy(first.copy())})
    for want, array in zip(session.run(None, {"x": first}), got.values(), strict=True):
        assert array.numpy().dtype == want.dtype
        np.testing.assert_allclose(array.numpy(), want, rtol=1e-5, atol=1e-5)


def test_every_operator_is_compared() -> None:
    assert {kind for kind, *_ in CASES} == OPERATORS.keys()


@pytest.mark.parametrize(
    ("kind", "others", "attributes", "what"),
    [
        ("ArgMax", [], {"select_last_index": 1}, "ArgMax that takes the last"),
        ("CumSum", [np.array(0)], {"exclusive": 1}, "CumSum that is exclusive"),
        ("CumSum", [np.array(0)], {"reverse": 1}, "CumSum that is .* backwards"),
        ("GatherND", [ints(0, 1)], {"batch_dims": 1}, "GatherND with batch_dims=1"),
        ("Pad", [ints(0, 0, 1, 1, 0, 0, 1, 1)], {"mode": "reflect"}, "Pad with mode=reflect"),
        ("Conv", [floats(8, 6, 3, 3)], {"auto_pad": "SAME_UPPER"}, "Conv other than"),
        ("Gelu", [], {"approximate": "tanh"}, "Gelu with approximate=tanh"),
        ("Resize", [None, np.array([1, 1, 1.5, 1], np.float32)], {"mode": "nearest"}, "Resize other than"),
        ("Resize", [None, np.array([1, 1, 2, 2], np.float32)], {"mode": "linear"}, "Resize other than"),
        ("Slice", [ints(3), ints(0), ints(1), ints(-1)], {}, "Slice that runs backwards"),
    ],
)
def test_a_use_that_is_not_offered_is_named(
    kind: str, others: list[Array | None], attributes: dict[str, Any], what: str
) -> None:
    module = OnnxModule(model_of(kind, X, others, attributes))
    with pytest.raises(BackendError, match=f"does not run {what}"):
        module({"x": torch.from_numpy(X)})


def test_an_unknown_operator_is_named_when_loading() -> None:
    with pytest.raises(BackendError, match="does not know the ONNX operator Einsum; use --backend onnxruntime"):
        OnnxModule(model_of("Einsum", X, [], {"equation": "abcd->a"}))


def test_another_opset_is_refused() -> None:
    model = model_of("Neg", X, [], {})
    model.opset_import[0].version = 17
    with pytest.raises(BackendError, match="opset 21"):
        OnnxModule(model)
