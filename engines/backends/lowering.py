"""A float32 ONNX graph with its products in 16 bits: the network body lowered, everything else untouched.

A strongly typed engine computes in the types the graph has. Convolutions and matrix products hold nearly all the
arithmetic; a cast before and after each lowers them alone. What they are fed is mostly bounded by normalisations,
so bfloat16's 8 bits do; float16's range (65,504) does where the export found so (``GraphSpec.lowered``). The
sinusoids of w and the timestep (at w·1000 one step of bfloat16 is 64), the normalisations, softmax, the sampler's
update and the blend stay float32, as do all inputs and outputs. Weights keep their place, in the file or beside it:
an engine folds their casts when it is built.

Source of the opset: https://onnx.ai/onnx/operators, where 22 gives convolutions bfloat16 and changes no meaning.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import onnx
from onnx import TensorProto, helper

from engines.manifest import Lowered

OPSET = 22
PRODUCTS = frozenset({"Attention", "Conv", "ConvTranspose", "Gemm", "Linear", "MatMul"})
"""Attention and Linear are those of ``engines.backends.torch_fused``; no bundle's graph holds any."""

TYPES: Final[dict[Lowered, int]] = {"bfloat16": TensorProto.BFLOAT16, "float16": TensorProto.FLOAT16}


def lower_products(model: onnx.ModelProto, dtype: Lowered) -> None:
    """Let the products compute in ``dtype``. model: all its products are float32; it is rewritten in place."""
    for entry in model.opset_import:
        entry.version = max(entry.version, OPSET)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    cast: set[str] = set()
    for node in nodes:
        model.graph.node.extend(_lowered(node, cast, dtype) if node.op_type in PRODUCTS else (node,))


def _lowered(node: onnx.NodeProto, cast: set[str], dtype: Lowered) -> Iterator[onnx.NodeProto]:
    """The product, between casts. cast: values that have their lowered copy already."""
    for i, name in enumerate(node.input):
        if not name:
            continue
        low = f"{name}/{dtype}"
        if name not in cast:
            cast.add(name)
            yield helper.make_node("Cast", [name], [low], to=TYPES[dtype])
        node.input[i] = low
    [output] = node.output
    node.output[0] = f"{output}/{dtype}"
    yield node
    cast.add(output)
    yield helper.make_node("Cast", [node.output[0]], [output], to=TensorProto.FLOAT)
