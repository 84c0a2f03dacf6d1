"""How much arithmetic a graph holds: what its time is held against."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from engines.errors import BackendError

_LARGE_BYTES = 4096
"""Of a constant: above it are weights, below it what shapes are computed from."""

_ON_LENGTHS = frozenset(
    {"Add", "Concat", "Div", "Gather", "Mul", "Reshape", "Slice", "Squeeze", "Sub", "Unsqueeze"}
)

Shapes = dict[str, tuple[int, ...]]


def product_flops(file: Path, rows: Mapping[str, tuple[int, ...]] | None = None) -> int:
    """Floating-point operations of one row in convolutions and matrix products, a multiply-add counting two.

    rows: shape of a row of each input, for graphs that leave it free. Everything else is left out: a few per cent
    of a network's, and limited by memory. Raises: BackendError when the shape of a product cannot be told.
    """
    model = onnx.load(str(file), load_external_data=False)
    for tensor in model.graph.input:
        row = (rows or {}).get(tensor.name, ())
        for dim, length in zip(tensor.type.tensor_type.shape.dim, (1, *row), strict=False):
            dim.dim_value = length
    _drop_weights(model)
    _skip_normalisations(model)
    inferred = _inferred(model)
    shapes = _shapes(inferred)
    try:
        return sum(_flops(node, shapes) for node in inferred.node)
    except KeyError as error:
        raise BackendError(
            f"{file}: the shape of {error} cannot be told, so its arithmetic was not counted"
        ) from None


def _flops(node: NodeProto, shapes: Shapes) -> int:
    if node.op_type not in ("Conv", "ConvTranspose", "MatMul", "Gemm"):
        return 0
    first, second, out = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
    if node.op_type == "Conv":
        return 2 * prod(out) * prod(second[1:])
    if node.op_type == "ConvTranspose":
        return 2 * prod(first) * prod(second[1:])
    turned = node.op_type == "Gemm" and any(a.name == "transA" and a.i for a in node.attribute)
    return 2 * prod(out) * first[0 if turned else -1]


def _inferred(model: ModelProto) -> GraphProto:
    """The graph with all shapes that can be told."""
    while True:
        graph = shape_inference.infer_shapes(model, data_prop=True).graph
        if not (known := _lengths(graph)):
            return graph
        computed = [node for node in model.graph.node if node.output[0] not in known]
        del model.graph.node[:]
        model.graph.node.extend(computed)
        model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in known.items())


def _lengths(graph: GraphProto) -> dict[str, NDArray[np.int64]]:
    """Lengths that follow from shapes known so far, with the divisions that inference itself does not follow."""
    shapes, values, found = _shapes(graph), _small_integers(graph), {}
    for node in graph.node:
        if node.op_type == "Shape" and node.input[0] in shapes:
            ends = {attribute.name: attribute.i for attribute in node.attribute}
            value = np.array(shapes[node.input[0]][ends.get("start") : ends.get("end")], np.int64)
        elif node.op_type in _ON_LENGTHS and all(name in values for name in node.input):
            made: Any = ReferenceEvaluator(node).run(None, {name: values[name] for name in node.input})
            value = np.asarray(made[0], np.int64)
        else:
            continue
        values[node.output[0]] = found[node.output[0]] = value
    return found


def _small_integers(graph: GraphProto) -> dict[str, NDArray[np.int64]]:
    small = (tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT64)
    return {t.name: numpy_helper.to_array(t) for t in small if t.ByteSize() <= _LARGE_BYTES}


def _shapes(graph: GraphProto) -> Shapes:
    """Of every value whose shape is known in full."""
    found = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim):
            found[value.name] = tuple(dim.dim_value for dim in kind.shape.dim)
    return found


def _drop_weights(model: ModelProto) -> None:
    """Leave of large constants their shapes alone: inference copies the whole message."""
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL and tensor.ByteSize() > _LARGE_BYTES:
            tensor.ClearField("raw_data")


def _skip_normalisations(model: ModelProto) -> None:
    """Group normalisations become copies, of the same shape: inference does not know all of them."""
    for node in model.graph.node:
        if node.op_type == "GroupNormalization":
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
