"""Graphs for a GPU's torch: what its kernels do at once, done at once.

Exporters spell out attention as products around a softmax, which writes every score to memory; here it is one
operator again, as are a linear layer with its bias and SiLU. Linear layers of one value, such as attention's
three, are one with all of their weights, which reads the value once. What products hand each other in 16 bits stays
in 16 bits while it is only reshaped, and is read in 16 bits by the sum that takes it up. Results are those of the
graph up to rounding: kernels sum in another order, and scores are not rounded to 16 bits in between.

``Attention`` (with an additive mask) and ``Swish`` mean what ONNX takes them to mean from opsets 23 and 24 on;
``Linear`` is MatMul with a matrix, and a bias. Source: https://onnx.ai/onnx/operators
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (the field's name for it)

from engines.backends.base import Precision
from engines.backends.lowering import PRODUCTS, TYPES, lower_products
from engines.backends.torch import HERE, OnnxModule, attributes_of, tensor_of
from engines.backends.torch_operators import OPERATORS, Operator
from engines.manifest import Lowered

_MOVES = frozenset({"Reshape", "Split", "Transpose"})


def fused_module(
    model: onnx.ModelProto, precision: Precision = "float32", device: str = "cpu", folder: Path = HERE
) -> OnnxModule:
    """The model as a module, its products in ``precision``. model: float32; its graph is rewritten in place.

    folder: where its weights lie that it does not hold. Raises: BackendError as OnnxModule does.
    """
    fuse(model.graph, folder)
    if precision != "float32":
        lower_products(model, precision)
        keep_low(model.graph, precision)
    return OnnxModule(model, device, FUSED, folder).eval()


def fuse(graph: onnx.GraphProto, folder: Path = HERE) -> None:
    """Put one node in the place of each pattern, whose own go where nothing else reads them."""
    known = _Known(graph, folder)
    for node in graph.node:
        fused = known.attention(node) or known.linear(node) or known.swish(node)
        if fused is not None:
            node.CopyFrom(fused)
    _drop_unread(graph)
    _join(graph, folder)


def keep_low(graph: onnx.GraphProto, dtype: Lowered) -> None:
    """Move the casts after lowered products past nodes that only move values; casts back to ``dtype`` then go.

    A sum of such a value and one in float32 reads it as it is: torch converts it on the way.
    """
    makers = {name: node.op_type for node in graph.node for name in node.output}
    low: dict[str, str] = {}  # float32 values, and the 16-bit ones they are copies of
    joined: dict[str, str] = {}
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        for i, name in enumerate(node.input):
            node.input[i] = joined.get(name, name)
        source, output = next(iter(node.input), ""), node.output[0]
        if node.op_type == "Cast" and source in low and attributes_of(node)["to"] == TYPES[dtype]:
            joined[output] = low[source]
            continue
        if node.op_type == "Cast" and makers.get(source) in PRODUCTS:
            low[output] = source
        if node.op_type in _MOVES and source in low:
            moved = {name: f"{name}/{dtype}" for name in node.output}
            low.update(moved)
            node.input[0] = low[source]
            node.output[:] = moved.values()
            graph.node.append(node)
            graph.node.extend(
                helper.make_node("Cast", [copy], [name], to=TensorProto.FLOAT) for name, copy in moved.items()
            )
            continue
        if node.op_type == "Add" and (read := [i for i, name in enumerate(node.input) if name in low]):
            node.input[read[0]] = low[node.input[read[0]]]
        graph.node.append(node)
    _drop_unread(graph)


def _join(graph: onnx.GraphProto, folder: Path) -> None:
    """Put one product in the place of those that multiply one value by weights of their own."""
    known = _Known(graph, folder)
    alike: dict[tuple[object, ...], list[onnx.NodeProto]] = {}
    for node in graph.node:
        if (kind := known.product_of_weights(node)) is not None:
            alike.setdefault(kind, []).append(node)
    joined = {node.output[0]: nodes for nodes in alike.values() if len(nodes) > 1 for node in nodes}
    nodes = sorted(graph.node, key=lambda node: known.dims(node.output[0]) is None)  # weights, for all that follow
    del graph.node[:]
    for node in nodes:
        parts = joined.get(node.output[0], [node])
        if len(parts) == 1:
            graph.node.append(node)
        elif node.output[0] == parts[0].output[0]:
            _append_joined(graph, parts, [known.width(each) for each in parts])


def _append_joined(graph: onnx.GraphProto, parts: Sequence[onnx.NodeProto], widths: Sequence[int]) -> None:
    """The product whose result holds those of ``parts`` side by side, and what takes it apart.

    widths: of the parts' results.
    """
    first = parts[0]
    name = f"{first.output[0]}/joined"
    graph.initializer.append(helper.make_tensor(f"{name}/widths", TensorProto.INT64, [len(parts)], widths))
    weights = [f"{name}/{i}" for i in range(1, len(first.input))]
    for i, weight in enumerate(weights, start=1):
        axis = 1 if i == 1 and not attributes_of(first).get("transB") else 0
        graph.node.append(helper.make_node("Concat", [part.input[i] for part in parts], [weight], axis=axis))
    whole = graph.node.add()
    whole.CopyFrom(first)
    whole.input[1:] = weights
    whole.output[0] = name
    outputs = [part.output[0] for part in parts]
    graph.node.append(helper.make_node("Split", [name, f"{name}/widths"], outputs, axis=-1))


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Leave the nodes that an output depends on."""
    read = {output.name for output in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if not read.isdisjoint(node.output):
            read.update(node.input)
            kept.append(node)
    del graph.node[:]
    graph.node.extend(reversed(kept))


class _Known:
    """Where the values of a graph come from."""

    def __init__(self, graph: onnx.GraphProto, folder: Path) -> None:
        self._folder = folder
        self._makers = {name: node for node in graph.node for name in node.output}
        self._constants = {constant.name: constant for constant in graph.initializer}

    def attention(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """softmax(s·q·s·kᵀ + mask)·v."""
        softmax = self._made_by(node.input[0], "Softmax") if node.op_type == "MatMul" else None
        if softmax is None or attributes_of(softmax).get("axis", -1) != -1:
            return None
        scores, mask = self._made_by(softmax.input[0], "MatMul"), ""
        if (added := self._made_by(softmax.input[0], "Add")) is not None:
            for product, other in (added.input, reversed(added.input)):
                scores, mask = self._made_by(product, "MatMul"), other
                if scores is not None:
                    break
        if scores is None:
            return None
        (q, of_q), (swapped, of_k) = (self._unscaled(name) for name in scores.input)
        if (k := self._swapped(swapped)) is None:
            return None
        inputs = [q, k, node.input[1], *([mask] if mask else [])]
        return helper.make_node("Attention", inputs, node.output, scale=of_q * of_k)

    def linear(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """x·weight + bias."""
        if node.op_type != "Add":
            return None
        for product, bias in (node.input, reversed(node.input)):
            matmul = self._made_by(product, "MatMul")
            if matmul is not None and (self._rank(matmul.input[1]), self._rank(bias)) == (2, 1):
                return helper.make_node("Linear", [*matmul.input, bias], node.output)
        return None

    def product_of_weights(self, node: onnx.NodeProto) -> tuple[object, ...] | None:
        """What linear layers have in common that can be one; None of what is none."""
        if node.op_type not in {"Gemm", "Linear", "MatMul"} or self._rank(node.input[1]) != 2:
            return None
        if any(self.dims(bias) != [self.width(node)] for bias in node.input[2:]):
            return None
        return node.op_type, node.input[0], len(node.input), tuple(sorted(attributes_of(node).items()))

    def width(self, node: onnx.NodeProto) -> int:
        """The last length of a linear layer's result."""
        lengths = self.dims(node.input[1])
        assert lengths is not None
        return lengths[0 if attributes_of(node).get("transB") else 1]

    def swish(self, node: onnx.NodeProto) -> onnx.NodeProto | None:
        """x·sigmoid(x)."""
        if node.op_type != "Mul":
            return None
        for x, gate in (node.input, reversed(node.input)):
            sigmoid = self._made_by(gate, "Sigmoid")
            if sigmoid is not None and sigmoid.input[0] == x:
                return helper.make_node("Swish", [x], node.output)
        return None

    def _made_by(self, name: str, kind: str) -> onnx.NodeProto | None:
        node = self._makers.get(name)
        return node if node is not None and node.op_type == kind else None

    def dims(self, name: str) -> list[int] | None:
        """Lengths of a weight, which may be kept in 16 bits; None of what is none."""
        cast = self._made_by(name, "Cast")
        constant = self._constants.get(name if cast is None else cast.input[0])
        return None if constant is None else list(constant.dims)

    def _rank(self, name: str) -> int | None:
        lengths = self.dims(name)
        return None if lengths is None else len(lengths)

    def _unscaled(self, name: str) -> tuple[str, float]:
        """A value before it was multiplied by a number, and the number: 1 where it was not."""
        if (scaled := self._made_by(name, "Mul")) is not None:
            for x, factor in (scaled.input, reversed(scaled.input)):
                number = self._constants.get(factor)
                if number is not None and math.prod(number.dims) == 1:
                    return x, float(tensor_of(number, self._folder))
        return name, 1.0

    def _swapped(self, name: str) -> str | None:
        """The value whose last two axes were swapped, as exporters do: Reshape, Transpose, Reshape. None: not so.

        Shapes in between are computed by the graph, so whether it is a swap is tried out.
        """
        source = name
        for kind in ("Reshape", "Transpose", "Reshape"):
            if (node := self._made_by(source, kind)) is None:
                return None
            source = node.input[0]
        probe = torch.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7)
        try:
            moved = self._computed(name, {source: probe})
        except (KeyError, RuntimeError):  # of values that are no shapes, or shapes of another rank
            return None
        return source if torch.equal(moved, probe.mT) else None

    def _computed(self, name: str, given: Mapping[str, Tensor]) -> Tensor:
        """A value, where some are given. Raises: KeyError where it depends on others."""
        if name in given:
            return given[name]
        if name in self._constants:
            return tensor_of(self._constants[name], self._folder)
        node = self._makers[name]
        computed: Tensor = OPERATORS[node.op_type](
            *(self._computed(each, given) for each in node.input), **attributes_of(node)
        )
        return computed


# ---- operators


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)


def _add(a: Tensor, b: Tensor) -> Tensor:
    """In float32 where either is: beside a single number torch would go by the other's type."""
    if a.dtype != b.dtype and 0 in (a.ndim, b.ndim):
        a, b = a.float(), b.float()
    return a + b


def _gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    left, right = a.T if transA else a, b.T if transB else b
    return alpha * (left @ right) if c is None else torch.addmm(c, left, right, beta=beta, alpha=alpha)


FUSED: dict[str, Operator] = {
    **OPERATORS,
    "Add": _add,
    "Attention": _attention,
    "Gelu": lambda x, approximate="none": F.gelu(x, approximate=approximate),
    "Gemm": _gemm,
    "Linear": lambda x, weight, bias: F.linear(x, weight.T, bias),
    "MatMul": torch.matmul,
    "Swish": F.silu,
}
