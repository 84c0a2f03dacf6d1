"""ONNX programs of torch modules, traced once for modules that differ in their weights alone.

A recipe has a student of one architecture for each step count. Kept are the newest few programs, without weights.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn
from torch.onnx import ONNXProgram

KEPT = 8

_kept: OrderedDict[str, ONNXProgram] = OrderedDict()


def program_of(module: nn.Module, asked: object, trace: Callable[[], ONNXProgram]) -> ONNXProgram:
    """The program that ``trace`` makes of ``module``, not optimised, with this module's weights.

    asked: whatever else decides what ``trace`` makes, of what pickle can write. A module that pickle cannot write
    is traced every time.
    """
    key = _key(module, asked)
    if key is None:
        return trace()
    if key not in _kept:
        _kept[key] = _without_weights(trace(), module)
        while len(_kept) > KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    program = ONNXProgram(_kept[key].model.clone(), None)
    weights = module.state_dict()
    program.apply_weights({name: weights[name] for name in weights if name in program.model.graph.initializers})
    return program


def _without_weights(program: ONNXProgram, module: nn.Module) -> ONNXProgram:
    for name in module.state_dict():
        if name in program.model.graph.initializers:
            program.model.graph.initializers[name].const_value = None
    return ONNXProgram(program.model, None)


class _Structure(pickle.Pickler):
    """Writes everything but the values of parameters; which of those are one and the same, too."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._order: dict[int, int] = {}

    def persistent_id(self, thing: object) -> object:
        if not isinstance(thing, Tensor):
            return None
        order = self._order.setdefault(id(thing), len(self._order))
        described = (order, tuple(thing.shape), str(thing.dtype), thing.requires_grad)
        if isinstance(thing, nn.Parameter):
            return described
        return *described, hashlib.sha256(thing.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def _key(module: nn.Module, asked: object) -> str | None:
    written = io.BytesIO()
    try:
        _Structure(written).dump((module, asked))
    except (pickle.PicklingError, AttributeError, TypeError):  # a lambda, a local class, a handle
        return None
    return hashlib.sha256(written.getvalue()).hexdigest()
