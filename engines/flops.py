"""How much arithmetic a graph holds: what its time is held against."""

from __future__ import annotations

from math import prod
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, shape_inference

from engines.errors import BackendError

_LARGE_BYTES = 4096
"""Of a constant: above it are weights, below it what shapes are computed from."""

Shapes = dict[str, tuple[int, ...]]


def product_flops(file: Path) -> int:
    """Floating-point operations of one row in convolutions and matrix products, a multiply-add counting two.

    Everything else is left out: a few per cent of a network's, and limited by memory. Raises: BackendError when the
    shape of a product cannot be told.
    """
    model = onnx.load(str(file), load_external_data=False)
    for tensor in model.graph.input:
        tensor.type.tensor_type.shape.dim[0].dim_value = 1
    _drop_weights(model)
    _skip_normalisations(model)
    inferred = shape_inference.infer_shapes(model, data_prop=True).graph
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
