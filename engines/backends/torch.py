"""torch on the CPU: the bundle's ONNX graphs, interpreted with torch operators.

The graph file stays the only thing a bundle needs for every backend, and nothing in it is executable: a
``torch.export`` archive would be a second copy of the weights bound to torch versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.backends.base import OfGraph, Precision, Rows
from engines.backends.graph_file import read_constant, read_graph
from engines.backends.torch_operators import MADE_OF_SHAPES, OPERATORS, SHAPE_INPUTS, Operator
from engines.errors import BackendError
from engines.machine import limited_threads
from engines.manifest import GraphSpec

OPSETS = (21, 22)
HERE = Path()
"""For models that hold all of their weights."""


class _Instruction(NamedTuple):
    """One node: where it reads and writes, and which values nobody needs after it."""

    kind: str
    operator: Operator
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    spent: tuple[str, ...]


class OnnxModule(torch.nn.Module):
    """An ONNX graph as a torch module.

    device: where its inputs are, and its weights, which lie there alone and with channels last unless it is the
    CPU. What describes shapes stays on the CPU, so that a run reads nothing back. operators: what its nodes mean.
    folder: where its weights lie that the model does not hold. weights: its constants that are data, by name.
    Raises: BackendError for another opset, an operator this backend does not know or weights that cannot be read.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        device: str = "cpu",
        operators: Mapping[str, Operator] = OPERATORS,
        folder: Path = HERE,
    ) -> None:
        super().__init__()
        opsets = {entry.domain: entry.version for entry in model.opset_import}
        if opsets.keys() != {""} or opsets[""] not in OPSETS:
            raise BackendError(f"the torch backend reads graphs of opset {OPSETS[0]}, not {opsets}")
        self._outputs = tuple(output.name for output in model.graph.output)
        self._device = device
        self.weights: dict[str, Tensor] = {}
        """On the device, and nowhere else."""
        self._constants: dict[str, Tensor] = {}
        """On the CPU."""
        self._placed: dict[str, Tensor] = {}
        """Of these, copies on the device."""
        constants = _Constants(model.graph, folder)
        program = _program(model.graph, operators, keep={*self._outputs, *constants.stored})
        self._program = tuple(step for step in program if not constants.make(step))
        self._keep(constants)

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name. inputs: by name, all with one batch size."""
        values: dict[str, Tensor] = {**self.weights, **self._constants, **inputs}
        for step in self._program:
            arguments = [values[name] if name else None for name in step.inputs]
            if self._device != "cpu":
                arguments = self._place(step, arguments)
            values.update(zip(step.outputs, _results(step, arguments, self._device), strict=True))
            for name in step.spent:
                del values[name]
        return {name: values[name] for name in self._outputs}

    def fixed(self, shapes: Mapping[str, Tensor]) -> FixedGraph:
        """The graph for inputs of these shapes alone. shapes: inputs of any values."""
        known, program = dict(self._constants), []
        values = {name: tensor.to("meta") for name, tensor in (*self.weights.items(), *shapes.items())}
        for step in self._program:
            of_shapes = step.kind == "Shape" or all(name in known for name in step.inputs if name)
            arguments = [values.get(name, known.get(name)) for name in step.inputs]
            if not of_shapes:
                program.append(step)
                arguments = [
                    argument if argument is None or i in _shape_inputs(step) else argument.to("meta")
                    for i, argument in enumerate(arguments)
                ]
            made = zip(step.outputs, _results(step, arguments, "cpu" if of_shapes else "meta"), strict=True)
            (known if of_shapes else values).update(made)
        read = {name for step in program for i, name in enumerate(step.inputs) if i not in _shape_inputs(step)}
        read.update(self._outputs)
        constants = {name: self._moved(tensor) for name, tensor in known.items() if name in read}
        numbers = {name: tensor.tolist() for name, tensor in known.items()}
        return FixedGraph(tuple(program), self._outputs, constants, numbers)

    def _keep(self, constants: _Constants) -> None:
        """Compute the constants that are read, one after another, and move each to where it is read."""
        shapes = {name for step in self._program for i, name in enumerate(step.inputs) if i in _shape_inputs(step)}
        read = (name for step in self._program for name in step.inputs)
        for name in dict.fromkeys((*read, *self._outputs)):
            if name in constants:
                self._put(name, constants.compute(name), name in shapes)

    def _put(self, name: str, tensor: Tensor, of_shapes: bool) -> None:
        if not of_shapes and _data([tensor]):
            self.weights[name] = self._moved(tensor)
        else:
            self._constants[name] = tensor

    def _place(self, step: _Instruction, arguments: list[Tensor | None]) -> list[Tensor | None]:
        """The arguments, constants on the device where they meet what is computed there.

        A constant is copied when it is first met, so later runs, and their capture, copy nothing.
        """
        if all(a is None or a.device.type == "cpu" for a in arguments) and not _data(arguments):
            return arguments  # arithmetic on shapes
        shapes = _shape_inputs(step)
        return [
            self._on_device(name) if name in self._constants and i not in shapes else argument
            for i, (name, argument) in enumerate(zip(step.inputs, arguments, strict=True))
        ]

    def _on_device(self, name: str) -> Tensor:
        if name not in self._placed:
            self._placed[name] = self._moved(self._constants[name])
        return self._placed[name]

    def _moved(self, tensor: Tensor) -> Tensor:
        layout = torch.channels_last if tensor.ndim == 4 and self._device != "cpu" else torch.preserve_format
        return tensor.to(self._device, memory_format=layout)


class FixedGraph(NamedTuple):
    """An OnnxModule's graph for inputs of fixed shapes: nothing computes lengths any more, or reads a value.

    constants: what it reads as data beside weights and inputs, by name, and lies where these do. numbers: what
    describes shapes, by name.
    """

    program: tuple[_Instruction, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Tensor]
    numbers: Mapping[str, Any]

    def run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name. given: weights, constants and inputs, by name."""
        values = dict(given)
        for step in self.program:
            arguments = [
                None if not name else (self.numbers if i in _shape_inputs(step) else values)[name]
                for i, name in enumerate(step.inputs)
            ]
            values.update(zip(step.outputs, _results(step, arguments), strict=True))
            for name in step.spent:
                values.pop(name, None)
        return {name: values[name] for name in self.outputs}


class TorchBackend(OfGraph):
    """One graph in eager torch, float32.

    threads: worker threads of the whole process, for torch has one pool; 0 leaves torch's choice.
    Raises: BackendError when the graph cannot be read or holds an operator this backend does not know.
    """

    def __init__(self, file: Path, spec: GraphSpec, threads: int = 0) -> None:
        self._spec = spec
        if threads := threads or limited_threads():
            torch.set_num_threads(threads)
        self._module: OnnxModule | None = OnnxModule(read_graph(file), folder=file.parent).eval()

    @property
    def name(self) -> str:
        return engine_name("float32")

    def run(self, rows: Rows) -> dict[str, NDArray[Any]]:
        if self._module is None:
            raise BackendError("this torch engine was closed; load it again")
        inputs = {t.name: torch.from_numpy(np.ascontiguousarray(rows[t.name])) for t in self._spec.inputs}
        alone = len(next(iter(inputs.values()))) == 1
        if alone:  # torch has other kernels for one row, which round differently
            inputs = {name: tensor.expand(2, *tensor.shape[1:]) for name, tensor in inputs.items()}
        try:
            with torch.inference_mode():
                outputs = self._module(inputs)
        except (RuntimeError, IndexError, KeyError) as error:
            raise BackendError(f"torch failed on {self._spec.file}: {error}") from error
        return {name: _owned(tensor[:1] if alone else tensor, inputs) for name, tensor in outputs.items()}

    def close(self) -> None:
        self._module = None


def engine_name(precision: Precision) -> str:
    """Backend, version and precision."""
    return f"torch {str(torch.__version__).partition('+')[0]} {precision}"


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """By name, as the operators take them."""
    return {a.name: _attribute(a) for a in node.attribute}


def tensor_of(constant: onnx.TensorProto, folder: Path) -> Tensor:
    """Its values, on the CPU. folder: of the graph's file. Raises: BackendError when they cannot be read."""
    return torch.from_numpy(read_constant(constant, folder).copy())


class _Constants:
    """What a graph stores, and what depends on that alone: casts of lowered weights move more than a step does.

    None of it is kept here, so that of a large network one weight at a time is in memory as it is stored.
    """

    def __init__(self, graph: onnx.GraphProto, folder: Path) -> None:
        self.stored = {constant.name: constant for constant in graph.initializer}
        self._made: dict[str, _Instruction] = {}
        self._folder = folder

    def __contains__(self, name: str) -> bool:
        return name in self.stored or name in self._made

    def make(self, step: _Instruction) -> bool:
        """Whether a node, whose predecessors were given before, makes constants; then they are known, too."""
        if constant := all(name in self for name in step.inputs if name):
            self._made.update(dict.fromkeys(step.outputs, step))
        return constant

    def compute(self, name: str) -> Tensor:
        """Its values, on the CPU."""
        if name in self.stored:
            return tensor_of(self.stored[name], self._folder)
        step = self._made[name]
        arguments = [self.compute(each) if each else None for each in step.inputs]
        return _results(step, arguments, "cpu")[step.outputs.index(name)]


def _program(graph: onnx.GraphProto, operators: Mapping[str, Operator], keep: set[str]) -> tuple[_Instruction, ...]:
    """The nodes in order, as instructions. keep: values that are never dropped."""
    last_use = {name: i for i, node in enumerate(graph.node) for name in (*node.input, *node.output) if name}
    instructions = []
    for i, node in enumerate(graph.node):
        operator = operators.get(node.op_type) if not node.domain else None
        if operator is None:
            raise BackendError(
                f"the torch backend does not know the ONNX operator {node.op_type}; use --backend onnxruntime"
            )
        outputs = tuple(name for name in node.output if name)
        spent = {name for name in (*node.input, *outputs) if name and last_use[name] == i} - keep
        instructions.append(
            _Instruction(
                node.op_type, operator, tuple(node.input), outputs, attributes_of(node), tuple(sorted(spent))
            )
        )
    return tuple(instructions)


def _results(step: _Instruction, arguments: list[Any], device: str = "cpu") -> tuple[Tensor, ...]:
    """The node's outputs. arguments: tensors, or None. device: where data is made that no argument holds."""
    made = {"device": device} if step.kind in MADE_OF_SHAPES else {}
    try:
        result = step.operator(*arguments, **step.attributes, **made)
    except NotImplementedError as error:
        raise BackendError(f"the torch backend does not run {error}") from None
    return result if isinstance(result, tuple) else (result,)


def _shape_inputs(step: _Instruction) -> frozenset[int]:
    """Which of its inputs are read on the CPU, by position."""
    return SHAPE_INPUTS.get(step.kind, frozenset())


def _data(arguments: list[Tensor | None]) -> bool:
    """Whether any is no length: a real number, or a mask such as that of causal attention."""
    return any(a is not None and (a.is_floating_point() or a.dtype == torch.bool) for a in arguments)


def _attribute(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


def _owned(tensor: Tensor, inputs: Mapping[str, Tensor]) -> NDArray[Any]:
    """The tensor as an array of its own: a graph may hand an input, or a view of one, straight through."""
    array: NDArray[Any] = tensor.contiguous().numpy()
    if any(np.shares_memory(array, given.numpy()) for given in inputs.values()):
        return array.copy()
    return array
