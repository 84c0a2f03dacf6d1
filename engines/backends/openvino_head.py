"""Splitting the sinusoids off a graph, so that a bfloat16 body never sees w or the timestep as numbers.

The CPU plugin, told to infer in bfloat16, lowers the *arguments* of sine and cosine too: at w·1000 one step of
bfloat16 is 64, many turns of the fastest wave. Precision marks on nodes are not exposed in Python and are lost
when a fusion replaces the node, so everything computed from those inputs alone, up to the first product with
weights, becomes a model of its own and runs in float32. The plugin keeps the tail after the last convolution
(update and blend) in float32 by itself.
"""

from __future__ import annotations

from typing import Any

import openvino as ov

from engines.errors import BackendError
from engines.manifest import GRID, GUIDANCE, TIME_IDS, TIMESTEP

_SCALARS = frozenset({TIMESTEP, GUIDANCE, GRID, TIME_IDS})
_PRODUCTS = frozenset({"MatMul", "Convolution", "GroupConvolution"})


def split_head(model: Any) -> tuple[Any, Any] | None:
    """(head, body) of an ``ov.Model``, or None where nothing depends on w, the timestep or the grid alone.

    The i-th output of the head is the body's input ``head_{i}``. model: becomes the body.
    Raises: BackendError when such an input meets weights before any sinusoid.
    """
    cuts = _cuts(model)
    if not cuts:
        return None
    copy = model.clone()
    originals = copy.get_ordered_ops()
    outputs = [originals[index].output(port) for index, port in cuts]
    head = ov.Model(outputs, _reached(outputs, copy.get_parameters()), "head")
    return head, _body(model, cuts)


def head_input(index: int) -> str:
    """Name of the body's input that takes the head's ``index``-th output."""
    return f"head_{index}"


def _cuts(model: Any) -> list[tuple[int, int]]:
    """(index among the ordered operations, output port) of every float that leaves the head."""
    operations = model.get_ordered_ops()
    inside: set[str] = set()
    for operation in operations:
        if _belongs(operation, inside):
            inside.add(operation.get_name())
    cuts = []
    for index, operation in enumerate(operations):
        if operation.get_name() not in inside:
            continue
        for output in operation.outputs():
            if output.get_element_type().is_real() and _outside(output, inside):
                if operation.get_type_name() == "Parameter":
                    raise BackendError("This graph multiplies w or the timestep by weights; run it in float32.")
                cuts.append((index, output.get_index()))
    return cuts


def _belongs(operation: Any, inside: set[str]) -> bool:
    kind = operation.get_type_name()
    if kind == "Parameter":
        return bool(_SCALARS & operation.output(0).get_names())
    if kind in _PRODUCTS or kind in {"Constant", "Result"}:
        return False
    sources = [value.get_source_output().get_node() for value in operation.inputs()]
    computed = [node for node in sources if node.get_type_name() != "Constant"]
    return bool(computed) and all(node.get_name() in inside for node in computed)


def _outside(output: Any, inside: set[str]) -> bool:
    return any(target.get_node().get_name() not in inside for target in output.get_target_inputs())


def _body(model: Any, cuts: list[tuple[int, int]]) -> Any:
    operations = model.get_ordered_ops()
    fresh = []
    for number, (index, port) in enumerate(cuts):
        output = operations[index].output(port)
        parameter = ov.opset13.parameter(output.get_partial_shape(), output.get_element_type())
        parameter.output(0).set_names({head_input(number)})
        for target in output.get_target_inputs():
            target.replace_source_output(parameter.output(0))
        fresh.append(parameter)
    results = model.get_results()
    used = _reached([result.output(0) for result in results], model.get_parameters())
    return ov.Model(results, [*used, *fresh], "body")


def _reached(outputs: list[Any], parameters: list[Any]) -> list[Any]:
    """The parameters that these outputs are computed from."""
    stack = [output.get_node() for output in outputs]
    seen = set()
    while stack:
        node = stack.pop()
        name = node.get_name()
        if name in seen:
            continue
        seen.add(name)
        stack.extend(value.get_source_output().get_node() for value in node.inputs())
    return [parameter for parameter in parameters if parameter.get_name() in seen]
