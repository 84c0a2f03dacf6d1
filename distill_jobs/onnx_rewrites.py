"""What is put right in a graph after torch's exporter wrote it; what it computes stays the same."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set

import numpy as np
import onnx
from onnx import helper, numpy_helper


def without_notes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph without the exporter's notes: stack traces with local paths, module names, inferred shapes."""
    graph = model.graph
    del graph.value_info[:]
    holders = [model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer]
    for holder in holders:
        holder.ClearField("doc_string")
        holder.ClearField("metadata_props")
    model.ClearField("producer_version")
    return model


def without_guards(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph without the zeros that the exporter puts for NaN after each softmax under a mask.

    They are for rows that see nothing, which our text encoders have none of; they would hide any other NaN, and
    TensorRT-RTX cannot fuse bfloat16 attention around them.
    """
    nodes = model.graph.node
    made_by = {name: node for node in nodes for name in node.output}
    guarded: dict[str, str] = {}
    for node in [node for node in nodes if node.op_type == "Where"]:
        test, softmax = made_by.get(node.input[0]), made_by.get(node.input[2])
        if test is None or softmax is None or (test.op_type, softmax.op_type) != ("IsNaN", "Softmax"):
            continue
        if test.input[0] == node.input[2]:
            guarded[node.output[0]] = node.input[2]
            nodes.remove(test)
            nodes.remove(node)
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = guarded.get(name, name)
    return model


def without_einsums(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with matrix products for einsums that are such, as ``bct,bcs->bts`` where prompts are pooled.

    Engines lower, quantize and count matrix products, and pass einsums by; the torch backend does not know them.
    """
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        model.graph.node.extend(_as_product(node) if node.op_type == "Einsum" else (node,))
    return model


def _as_product(einsum: onnx.NodeProto) -> Sequence[onnx.NodeProto]:
    """The nodes of a product of two batches of matrices; the einsum itself where it is something else."""
    equation = next(a.s.decode() for a in einsum.attribute if a.name == "equation")
    terms = re.fullmatch(r"(\w{3}),(\w{3})->(\w{3})", equation.replace(" ", ""))
    summed = set() if terms is None else set(terms[1] + terms[2]) - set(terms[3])
    if terms is None or len(summed) != 1:
        return (einsum,)
    operands = dict(zip(terms.groups()[:2], einsum.input, strict=True))
    batch, row, column, inner = *list(terms[3]), summed.pop()
    nodes, factors = [], []
    for wanted in (batch + row + inner, batch + inner + column):
        turned = wanted[0] + wanted[:0:-1]
        if wanted in operands:
            factors.append(operands[wanted])
        elif turned in operands:
            factors.append(f"{einsum.output[0]}_{len(factors)}")
            nodes.append(helper.make_node("Transpose", [operands[turned]], factors[-1:], perm=[0, 2, 1]))
        else:
            return (einsum,)
    return (*nodes, helper.make_node("MatMul", factors, list(einsum.output), name=einsum.name))


def with_means_as_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with a matrix product for each mean over the tokens of (B, L, D), as where prompts are pooled.

    ONNX Runtime sums such a mean of one row in another order than of several, and a row must not depend on its
    company. Lengths are read from the exporter's notes.
    """
    graph = model.graph
    lengths = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.value_info}
    axes = {t.name: numpy_helper.to_array(t).tolist() for t in graph.initializer if list(t.dims) == [1]}
    for node in graph.node:
        if node.op_type != "ReduceMean" or len(node.input) != 2 or axes.get(node.input[1]) != [1]:
            continue
        shape = lengths.get(node.input[0], [])
        if len(shape) != 3 or not shape[1] or any(a.name == "keepdims" and not a.i for a in node.attribute):
            continue
        share = numpy_helper.from_array(
            np.full((1, 1, shape[1]), 1 / shape[1], np.float32), f"{node.output[0]}_share"
        )
        graph.initializer.append(share)
        node.CopyFrom(helper.make_node("MatMul", [share.name, node.input[0]], list(node.output), name=node.name))
    return model


def with_scales_added(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with x + x·s in place of x·(1 + s) after a group normalisation: ``scale_shift`` of a UNet.

    OpenVINO 2026.4, told the shapes, ends the process while it fuses that product into the normalisation.
    """
    made_by = {name: node for node in model.graph.node for name in node.output}
    ones = {tensor.name for tensor in model.graph.initializer if _is_one(tensor)}
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        model.graph.node.extend(_as_sum(node, made_by, ones) if node.op_type == "Mul" else (node,))
    return _without_leftovers(model)


def _without_leftovers(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph without nodes and constants that nothing reads any more."""
    graph = model.graph
    read = {output.name for output in graph.output}
    for node in reversed(list(graph.node)):  # a node stands after those that it reads
        if read.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            read.update(node.input)
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)
    return model


def _as_sum(
    product: onnx.NodeProto, made_by: Mapping[str, onnx.NodeProto], ones: Set[str]
) -> Sequence[onnx.NodeProto]:
    """x + x·s for a product x·(1 + s) of a group normalisation's x; else the product."""
    for x, factor in (product.input, reversed(product.input)):
        norm, total = made_by.get(x), made_by.get(factor)
        if norm is None or total is None or (norm.op_type, total.op_type) != ("GroupNormalization", "Add"):
            continue
        scales = [name for name in total.input if name not in ones]
        if len(scales) == 1:
            added = f"{product.output[0]}_added"
            return (
                helper.make_node("Mul", [x, scales[0]], [added]),
                helper.make_node("Add", [x, added], list(product.output), name=product.name),
            )
    return (product,)


def _is_one(tensor: onnx.TensorProto) -> bool:
    return not tensor.dims and bool(numpy_helper.to_array(tensor) == 1)
