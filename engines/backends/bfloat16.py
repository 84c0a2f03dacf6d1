"""A float32 ONNX graph with its products in bfloat16: the network body lowered, everything else untouched.

A strongly typed engine computes in the types the graph has. Convolutions and matrix products hold nearly all the
arithmetic; a cast before and after each lowers them alone. What they are fed is bounded by normalisations, so
bfloat16's range and 8 bits do. The sinusoids of w and the timestep (at w·1000 one step of bfloat16 is 64), the
normalisations, softmax, the sampler's update and the blend stay float32, as do all inputs and outputs. Weights keep
their place, in the file or beside it: an engine folds their casts when it is built.

Source of the opset: https://onnx.ai/onnx/operators, where 22 gives convolutions bfloat16 and changes no meaning.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import TensorProto, helper

OPSET = 22
_PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def lower_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` whose products compute in bfloat16. model: all its products are float32."""
    lowered = onnx.ModelProto()
    lowered.CopyFrom(model)
    for entry in lowered.opset_import:
        entry.version = max(entry.version, OPSET)
    nodes = list(lowered.graph.node)
    del lowered.graph.node[:]
    cast: set[str] = set()
    for node in nodes:
        lowered.graph.node.extend(_lowered(node, cast) if node.op_type in _PRODUCTS else (node,))
    return lowered


def _lowered(node: onnx.NodeProto, cast: set[str]) -> Iterator[onnx.NodeProto]:
    """The product, between casts. cast: values that have their bfloat16 copy already."""
    for i, name in enumerate(node.input):
        if not name:
            continue
        if name not in cast:
            cast.add(name)
            yield helper.make_node("Cast", [name], [_low(name)], to=TensorProto.BFLOAT16)
        node.input[i] = _low(name)
    [output] = node.output
    node.output[0] = _low(output)
    yield node
    cast.add(output)
    yield helper.make_node("Cast", [_low(output)], [output], to=TensorProto.FLOAT)


def _low(name: str) -> str:
    return f"{name}/bfloat16"
