"""Graphs put right after their export compute what they computed before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from distill_jobs.onnx_rewrites import with_means_as_products, with_scales_added, without_einsums

LENGTHS = {"b": 3, "r": 4, "k": 5, "c": 6}


def value(name: str, shape: Sequence[int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def model_of(graph: onnx.GraphProto) -> onnx.ModelProto:
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def operators(model: onnx.ModelProto) -> list[str]:
    onnx.checker.check_model(model)
    return [node.op_type for node in model.graph.node]


def run(model: onnx.ModelProto) -> np.ndarray:
    """Of the same random inputs for every model."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    rows = {i.name: rng.standard_normal(i.shape, dtype=np.float32) for i in session.get_inputs()}
    output: np.ndarray = session.run(None, rows)[0]
    return output


def of_einsum(equation: str) -> onnx.ModelProto:
    terms, result = equation.replace(" ", "").split("->")
    kinds = dict(zip(("x", "y", "z"), (*terms.split(","), result), strict=True))
    x, y, z = (value(name, [LENGTHS[letter] for letter in letters]) for name, letters in kinds.items())
    node = helper.make_node("Einsum", ["x", "y"], ["z"], equation=equation)
    return model_of(helper.make_graph([node], "graph", [x, y], [z]))


@pytest.mark.parametrize(
    ("equation", "expected"),
    [
        ("brk,bkc->brc", ["MatMul"]),
        ("bkr, bkc -> brc", ["Transpose", "MatMul"]),
        ("brk,bck->brc", ["Transpose", "MatMul"]),
        ("bkr,bck->brc", ["Transpose", "Transpose", "MatMul"]),
        ("bck,brk->brc", ["Transpose", "MatMul"]),
        ("rbk,bkc->brc", ["Einsum"]),
        ("bk,bkc->bc", ["Einsum"]),
        ("brk,brk->brk", ["Einsum"]),
    ],
)
def test_an_einsum_that_is_a_product_becomes_one(equation: str, expected: list[str]) -> None:
    model = without_einsums(of_einsum(equation))
    assert operators(model) == expected
    np.testing.assert_allclose(run(model), run(of_einsum(equation)), rtol=0, atol=1e-5)


def of_scales(one: float, *, swapped: bool = False, normalised: bool = True) -> onnx.ModelProto:
    """x·(one + s), with x normalised or not."""
    constants = [("gamma", np.arange(1, 5)), ("beta", np.arange(4)), ("one", np.array(one))]
    norm = helper.make_node("GroupNormalization", ["image", "gamma", "beta"], ["x"], num_groups=2)
    factors = ["scale", "x"] if swapped else ["x", "scale"]
    nodes = [
        norm if normalised else helper.make_node("Neg", ["image"], ["x"]),
        helper.make_node("Add", ["one", "s"] if swapped else ["s", "one"], ["scale"]),
        helper.make_node("Mul", factors, ["y"]),
    ]
    read = {name for node in nodes for name in node.input}
    tensors = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in constants if name in read]
    shape = (2, 4, 3, 3)
    inputs = [value("image", shape), value("s", (2, 4, 1, 1))]
    return model_of(helper.make_graph(nodes, "graph", inputs, [value("y", shape)], tensors))


@pytest.mark.parametrize("swapped", [False, True])
def test_a_scale_after_a_normalisation_is_added(swapped: bool) -> None:
    model = with_scales_added(of_scales(1, swapped=swapped))
    assert operators(model) == ["GroupNormalization", "Mul", "Add"]
    assert {tensor.name for tensor in model.graph.initializer} == {"gamma", "beta"}
    np.testing.assert_allclose(run(model), run(of_scales(1, swapped=swapped)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kept", [of_scales(2), of_scales(1, normalised=False)], ids=["another sum", "no norm"])
def test_other_products_stay(kept: onnx.ModelProto) -> None:
    before = operators(kept)
    assert operators(with_scales_added(kept)) == before


def of_mean(axis: int, keepdims: int = 1) -> onnx.ModelProto:
    """The mean of what tokens say, with the exporter's notes of lengths."""
    axes = numpy_helper.from_array(np.array([axis]), "axes")
    nodes = [
        helper.make_node("Neg", ["x"], ["y"]),
        helper.make_node("ReduceMean", ["y", "axes"], ["z"], keepdims=keepdims),
    ]
    kept = [1 if i == axis else length for i, length in enumerate((2, 7, 5)) if keepdims or i != axis]
    return onnx.shape_inference.infer_shapes(
        model_of(helper.make_graph(nodes, "graph", [value("x", (2, 7, 5))], [value("z", kept)], [axes]))
    )


def test_a_mean_over_tokens_becomes_a_product() -> None:
    model = with_means_as_products(of_mean(1))
    assert operators(model) == ["Neg", "MatMul"]
    np.testing.assert_allclose(run(model), run(of_mean(1)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("axis", "keepdims"), [(2, 1), (0, 1), (1, 0)])
def test_other_means_stay(axis: int, keepdims: int) -> None:
    assert operators(with_means_as_products(of_mean(axis, keepdims))) == ["Neg", "ReduceMean"]
