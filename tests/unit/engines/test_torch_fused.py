"""What torch does at once on a GPU is what the graph spells out; near misses are left alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from engines.backends.lowering import lower_products
from engines.backends.torch import OnnxModule
from engines.backends.torch_fused import FUSED, fuse, fused_module, keep_low
from engines.manifest import Lowered

Array = NDArray[np.float32]
B, HEADS, ROWS, WIDTH = 2, 3, 5, 4
RNG = np.random.default_rng(0)


def floats(*shape: int) -> Array:
    return RNG.standard_normal(shape, dtype=np.float32)


def node(kind: str, inputs: str, output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [output], **attributes)


def model_of(
    nodes: list[onnx.NodeProto], inputs: dict[str, Array], constants: dict[str, Array], outputs: str = ""
) -> onnx.ModelProto:
    """Its output is the last node's, unless ``outputs`` are named."""
    graph = helper.make_graph(
        nodes,
        "pattern",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in inputs.items()],
        [helper.make_empty_tensor_value_info(name) for name in outputs.split() or nodes[-1].output],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def check(model: onnx.ModelProto, inputs: dict[str, Array], kinds: dict[str, int]) -> None:
    """Fusing leaves ``kinds`` of nodes among others (0: none), and the result."""
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}
    expected = OnnxModule(model)(given)
    fuse(model.graph)
    found = Counter(each.op_type for each in model.graph.node)
    assert {kind: found[kind] for kind in kinds} == kinds
    got = OnnxModule(model, operators=FUSED)(given)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


# ---- attention

HEADS_SHAPE = (B, HEADS, ROWS, WIDTH)
QKV = {name: floats(*HEADS_SHAPE) for name in "qkv"}
HALF = np.array([0.5], np.float32)
CONSTANTS = {
    "half": HALF,
    "third": np.array(1 / 3, np.float32),
    "zero": np.array([0]),
    "minus_two": np.array([-2]),
    "minus_one": np.array([-1]),
    "end": np.array([2**63 - 1]),
}


def swap(order: str = "batch last before") -> list[onnx.NodeProto]:
    """k with its last two axes swapped, as torch's exporter does. order: of the axes it reshapes to in the end."""
    return [
        node("Shape", "k", "shape"),
        node("Slice", "shape minus_one end", "last"),
        node("Slice", "shape minus_two minus_one", "before"),
        node("Slice", "shape zero minus_two", "batch"),
        node("Concat", "minus_one before last", "to_three", axis=0),
        node("Reshape", "k to_three", "k3"),
        node("Transpose", "k3", "k3t", perm=[0, 2, 1]),
        node("Concat", order, "to_four", axis=0),
        node("Reshape", "k3t to_four", "kt"),
    ]


def scaled_scores() -> list[onnx.NodeProto]:
    return [
        node("Mul", "q half", "qs"),
        node("Mul", "third kt", "ks"),
        node("MatMul", "qs ks", "scores"),
    ]


def weighted(scores: str = "scores", axis: int = -1) -> list[onnx.NodeProto]:
    return [node("Softmax", scores, "weights", axis=axis), node("MatMul", "weights v", "out")]


def test_attention_is_one_operator() -> None:
    model = model_of([*swap(), *scaled_scores(), *weighted()], QKV, CONSTANTS)
    check(model, QKV, {"Attention": 1})
    [fused] = model.graph.node
    assert list(fused.input) == ["q", "k", "v"]
    assert helper.get_attribute_value(fused.attribute[0]) == pytest.approx(1 / 6)


@pytest.mark.parametrize("order", ["scores mask", "mask scores"])
def test_a_mask_goes_with_it(order: str) -> None:
    nodes = [*swap(), *scaled_scores(), node("Add", order, "masked"), *weighted("masked")]
    causal = np.triu(np.full((1, 1, ROWS, ROWS), np.finfo(np.float32).min), 1).astype(np.float32)
    model = model_of(nodes, QKV, {**CONSTANTS, "mask": causal})
    check(model, QKV, {"Attention": 1, "Softmax": 0})


def test_scores_without_a_scale_are_attention_too() -> None:
    model = model_of([*swap(), node("MatMul", "q kt", "scores"), *weighted()], QKV, CONSTANTS)
    check(model, QKV, {"Attention": 1, "Softmax": 0})


def test_a_softmax_over_queries_is_not_attention() -> None:
    model = model_of([*swap(), *scaled_scores(), *weighted(axis=2)], QKV, CONSTANTS)
    check(model, QKV, {"Attention": 0, "Softmax": 1})


def test_keys_that_are_not_swapped_are_not_attention() -> None:
    """A reshape to (rows, width) of what has been (width, rows) in memory mixes the keys up."""
    inputs = {**QKV, "q": floats(B, HEADS, ROWS, ROWS), "v": floats(B, HEADS, WIDTH, WIDTH)}
    nodes = [*swap("batch before last"), node("MatMul", "q kt", "scores"), *weighted()]
    check(model_of(nodes, inputs, CONSTANTS), inputs, {"Attention": 0, "Softmax": 1})


def test_keys_from_elsewhere_are_not_attention() -> None:
    inputs = {**QKV, "k": floats(B, HEADS, WIDTH, ROWS)}
    nodes = [node("MatMul", "q k", "scores"), *weighted()]
    check(model_of(nodes, inputs, CONSTANTS), inputs, {"Attention": 0, "Softmax": 1})


def test_scores_that_something_else_reads_stay() -> None:
    nodes = [
        *swap(),
        *scaled_scores(),
        *weighted(),
        node("ReduceMean", "weights", "mean"),
        node("Add", "out mean", "both"),
    ]
    check(model_of(nodes, QKV, CONSTANTS), QKV, {"Attention": 1, "Softmax": 1})


# ---- linear layers and SiLU

X = {"x": floats(B, ROWS, WIDTH)}


@pytest.mark.parametrize("order", ["product bias", "bias product"])
def test_a_product_with_a_bias_is_one_operator(order: str) -> None:
    nodes = [node("MatMul", "x weight", "product"), node("Add", order, "out")]
    model = model_of(nodes, X, {"weight": floats(WIDTH, 6), "bias": floats(6)})
    check(model, X, {"Linear": 1, "MatMul": 0, "Add": 0})


def test_weights_kept_in_16_bits_are_weights() -> None:
    nodes = [
        node("Cast", "weight", "weight32", to=TensorProto.FLOAT),
        node("Cast", "bias", "bias32", to=TensorProto.FLOAT),
        node("MatMul", "x weight32", "product"),
        node("Add", "product bias32", "out"),
    ]
    half = {"weight": floats(WIDTH, 6).astype(np.float16), "bias": floats(6).astype(np.float16)}
    check(model_of(nodes, X, half), X, {"Linear": 1, "MatMul": 0})


@pytest.mark.parametrize("added", ["x", "matrix"])
def test_what_is_no_bias_is_added_by_itself(added: str) -> None:
    nodes = [node("MatMul", "x weight", "product"), node("Add", f"product {added}", "out")]
    constants = {"weight": floats(WIDTH, WIDTH), "matrix": floats(ROWS, WIDTH)}
    check(model_of(nodes, X, constants), X, {"Linear": 0, "MatMul": 1, "Add": 1})


@pytest.mark.parametrize("attributes", [{}, {"transB": 1, "alpha": 0.5, "beta": 2.0}, {"transA": 1}])
@pytest.mark.parametrize("inputs", ["x weight", "x weight bias"])
def test_gemm(inputs: str, attributes: dict[str, float]) -> None:
    square = {"x": floats(WIDTH, WIDTH)}
    constants = {"weight": floats(WIDTH, WIDTH), "bias": floats(WIDTH)}
    check(model_of([node("Gemm", inputs, "out", **attributes)], square, constants), square, {"Gemm": 1})


def test_gelu() -> None:
    check(model_of([node("Gelu", "x", "out")], X, {}), X, {"Gelu": 1})


@pytest.mark.parametrize("order", ["x gate", "gate x"])
def test_silu_is_one_operator(order: str) -> None:
    nodes = [node("Sigmoid", "x", "gate"), node("Mul", order, "out")]
    check(model_of(nodes, X, {}), X, {"Swish": 1, "Sigmoid": 0, "Mul": 0})


def test_the_quick_gelu_is_not_silu() -> None:
    nodes = [node("Mul", "x slope", "steep"), node("Sigmoid", "steep", "gate"), node("Mul", "x gate", "out")]
    check(model_of(nodes, X, {"slope": np.array(1.702, np.float32)}), X, {"Swish": 0, "Sigmoid": 1})


def test_what_nothing_reads_is_not_run() -> None:
    nodes = [node("Cast", "x", "unread", to=TensorProto.FLOAT16), node("Neg", "x", "out")]
    check(model_of(nodes, X, {}), X, {"Cast": 0, "Neg": 1})


@pytest.mark.parametrize("factors", [(1, 1, 2, 4), (1, 1, 3, 2), (1, 2, 2, 2)])
def test_images_grow_in_one_kernel_that_keeps_channels_last(factors: tuple[int, ...]) -> None:
    """Where the kernel's arithmetic is exact; elsewhere as it is spelt."""
    images = {"x": floats(2, 8, 6, 5)}
    constants = {"scales": np.array(factors, np.float32)}
    model = model_of([node("Resize", "x none scales", "out", mode="nearest")], images, constants)
    model.graph.node[0].input[1] = ""
    check(model, images, {"Resize": 1})
    last = torch.from_numpy(images["x"]).to(memory_format=torch.channels_last)
    [grown] = OnnxModule(model, operators=FUSED)({"x": last}).values()
    if factors == (1, 1, 2, 4):
        assert grown.is_contiguous(memory_format=torch.channels_last)


# ---- products of one value

SHARED = {"x": floats(B, ROWS, WIDTH)}
WEIGHTS = {"first": floats(WIDTH, 6), "second": floats(WIDTH, 2), "third": floats(WIDTH, 6)}
BIASES = {"bias": floats(6), "other": floats(2)}


def test_matrix_products_of_one_value_are_one() -> None:
    nodes = [
        node("MatMul", "x first", "a"),
        node("Neg", "a", "a/less"),
        node("MatMul", "x second", "b"),
        node("MatMul", "x third", "c"),
        node("Mul", "a/less c", "d"),
    ]
    model = model_of(nodes, SHARED, WEIGHTS, "d b")
    check(model, SHARED, {"MatMul": 1, "Split": 1, "Concat": 1})
    [split] = [each for each in model.graph.node if each.op_type == "Split"]
    assert list(split.output) == ["a", "b", "c"]


def test_linear_layers_of_one_value_are_one() -> None:
    nodes = [
        node("MatMul", "x first", "a/product"),
        node("Add", "a/product bias", "a"),
        node("MatMul", "x second", "b/product"),
        node("Add", "other b/product", "b"),
    ]
    check(model_of(nodes, SHARED, {**WEIGHTS, **BIASES}, "a b"), SHARED, {"Linear": 1, "MatMul": 0, "Split": 1})


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("attributes", [{}, {"transB": 1, "alpha": 0.5, "beta": 2.0}, {"transA": 1}])
def test_gemms_of_one_value_are_one(biased: bool, attributes: dict[str, float]) -> None:
    flat = {"x": floats(*((WIDTH, ROWS) if attributes.get("transA") else (ROWS, WIDTH)))}
    weights = {name: array.T.copy() if attributes.get("transB") else array for name, array in WEIGHTS.items()}
    nodes = [
        node("Gemm", "x first bias" if biased else "x first", "a", **attributes),
        node("Gemm", "x second other" if biased else "x second", "b", **attributes),
    ]
    check(model_of(nodes, flat, {**weights, **BIASES}, "a b"), flat, {"Gemm": 1, "Split": 1})


def test_weights_in_16_bits_that_are_read_later_are_there_in_time() -> None:
    nodes = [
        node("Cast", "first", "first32", to=TensorProto.FLOAT),
        node("MatMul", "x first32", "a"),
        node("Cast", "second", "second32", to=TensorProto.FLOAT),
        node("MatMul", "x second32", "b"),
    ]
    half = {name: array.astype(np.float16) for name, array in WEIGHTS.items()}
    check(model_of(nodes, SHARED, half, "a b"), SHARED, {"MatMul": 1, "Split": 1})


@pytest.mark.parametrize(
    "second",
    [
        node("MatMul", "y second", "b"),  # of another value
        node("MatMul", "x of_rows", "b"),  # by a matrix a batch row
        node("MatMul", "x y", "b"),  # by what is computed
        node("MatMul", "turned x", "b"),  # the value is on the right
    ],
)
def test_products_that_share_less_stay_apart(second: onnx.NodeProto) -> None:
    inputs = {**SHARED, "x": floats(B, WIDTH, WIDTH), "y": floats(B, WIDTH, WIDTH)}
    constants = {**WEIGHTS, "of_rows": floats(B, WIDTH, 2), "turned": floats(2, WIDTH)}
    nodes = [node("MatMul", "x first", "a"), second]
    check(model_of(nodes, inputs, constants, "a b"), inputs, {"MatMul": 2, "Split": 0})


@pytest.mark.parametrize(
    "second",
    [
        node("Gemm", "x second", "b"),
        node("Gemm", "x second other", "b", alpha=0.5),
        node("Gemm", "x turned other", "b", transB=1),
        node("Gemm", "x second one", "b"),
        node("Gemm", "x second of_rows", "b"),
        node("Gemm", "x second y", "b"),
    ],
    ids=["no bias", "scaled", "turned", "a number", "a bias a row", "computed"],
)
def test_gemms_of_different_kinds_stay_apart(second: onnx.NodeProto) -> None:
    flat = {"x": floats(ROWS, WIDTH), "y": floats(2)}
    constants = {**WEIGHTS, **BIASES, "turned": floats(2, WIDTH), "one": floats(1), "of_rows": floats(ROWS, 2)}
    nodes = [node("Gemm", "x first bias", "a"), second]
    check(model_of(nodes, flat, constants, "a b"), flat, {"Gemm": 2, "Split": 0})


# ---- 16 bits

LOW: dict[Lowered, int] = {"bfloat16": TensorProto.BFLOAT16, "float16": TensorProto.FLOAT16}


@pytest.mark.parametrize("dtype", LOW)
def test_what_is_reshaped_between_products_stays_in_16_bits(dtype: Lowered) -> None:
    """And is the same to the bit: to float32 and back loses nothing."""
    nodes = [
        node("MatMul", "x first", "a"),
        node("Reshape", "a four", "b"),
        node("Transpose", "b", "c", perm=[0, 2, 1, 3]),
        node("MatMul", "c second", "d"),
        node("Cast", "c", "levels", to=TensorProto.INT32),
        node("Cast", "levels", "whole", to=TensorProto.FLOAT),
        node("Add", "d whole", "out"),
    ]
    constants = {"first": floats(WIDTH, 6), "four": np.array([0, 0, 2, 3]), "second": floats(3, 3)}
    lowered = model_of(nodes, X, constants)
    lower_products(lowered, dtype)
    given = {"x": torch.from_numpy(X["x"])}
    [expected] = OnnxModule(lowered, operators=FUSED)(given).values()
    keep_low(lowered.graph, dtype)
    [got] = OnnxModule(lowered, operators=FUSED)(given).values()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    makers = {name: each for each in lowered.graph.node for name in each.output}
    second = next(each for each in lowered.graph.node if each.output[0].startswith("d/"))
    chain = [(moved := makers[second.input[0]]).op_type, (reshaped := makers[moved.input[0]]).op_type]
    assert [*chain, makers[reshaped.input[0]].op_type] == ["Transpose", "Reshape", "MatMul"]


@pytest.mark.parametrize("dtype", LOW)
def test_what_is_taken_apart_between_products_stays_in_16_bits(dtype: Lowered) -> None:
    nodes = [
        node("MatMul", "x first", "whole"),
        helper.make_node("Split", ["whole", "widths"], ["a", "b"], axis=-1),
        node("MatMul", "a b", "c"),
        node("Softmax", "b", "likely"),
        node("MatMul", "c likely", "out"),
    ]
    constants = {"first": floats(WIDTH, 2 * ROWS), "widths": np.array([ROWS, ROWS])}
    lowered = model_of(nodes, X, constants)
    lower_products(lowered, dtype)
    given = {"x": torch.from_numpy(X["x"])}
    [expected] = OnnxModule(lowered, operators=FUSED)(given).values()
    keep_low(lowered.graph, dtype)
    [got] = OnnxModule(lowered, operators=FUSED)(given).values()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    makers = {name: each.op_type for each in lowered.graph.node for name in each.output}
    product = next(each for each in lowered.graph.node if each.output[0].startswith("c/"))
    assert [makers[name] for name in product.input] == ["Split", "Split"]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("order", ["a other", "other a", "a a", "a b"])
@pytest.mark.parametrize("shape", [(B, ROWS, WIDTH), ()], ids=["rows", "a number"])
def test_a_sum_reads_a_product_as_it_is_and_is_in_float32(
    dtype: Lowered, order: str, shape: tuple[int, ...]
) -> None:
    nodes = [
        node("MatMul", "x first", "a"),
        node("MatMul", "x second", "b"),
        node("Neg", "given", "other"),
        node("Add", order, "out"),
    ]
    inputs = {**X, "given": floats(*shape)}
    lowered = model_of(nodes, inputs, {"first": floats(WIDTH, WIDTH), "second": floats(WIDTH, WIDTH)})
    lower_products(lowered, dtype)
    given = {name: torch.from_numpy(np.asarray(array)) for name, array in inputs.items()}
    [expected] = OnnxModule(lowered, operators=FUSED)(given).values()
    keep_low(lowered.graph, dtype)
    [got] = OnnxModule(lowered, operators=FUSED)(given).values()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    [added] = [each for each in lowered.graph.node if each.op_type == "Add"]
    assert sum(name.endswith(f"/{dtype}") for name in added.input) == 1


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.03), ("float16", 0.004)])
def test_a_unet_in_16_bits_loses_no_more_than_its_products_do(
    unet_file: Path, dtype: Lowered, bound: float
) -> None:
    """As tests/unit/engines/test_lowering.py bounds them, whose casts these are half of."""
    from tests.support.step_rows import random_rows

    model = onnx.load(str(unet_file))
    rows = {name: torch.from_numpy(array) for name, array in random_rows(4, seed=3).items()}
    with torch.inference_mode():
        expected = OnnxModule(model)(rows)
        got = fused_module(onnx.load(str(unet_file)), dtype)(rows)
    for name, tensor in expected.items():
        error = (got[name] - tensor).abs().max() / tensor.abs().max()
        assert 0 < error < bound
