"""A graph's weights kept in 16 bits and cast back where they are read: half the file, and float32 arithmetic."""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx_ir as ir

LEAST_NUMBERS = 1024
"""Constants of fewer stay as they are: they are no weights, or nothing is saved."""

ROUNDED_LIMIT: Final = 1e-2
"""How far rounding the weights may move an output, as a share of the largest: far more than it is seen to."""


def keep_in_float16(graph: ir.Graph) -> None:
    """Change ``graph`` so that its large float32 constants are stored rounded to float16.

    Raises: OverflowError naming a weight beyond float16's 65,504.
    """
    casts = []
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < LEAST_NUMBERS:
            continue
        with np.errstate(over="ignore"):
            rounded = tensor.numpy().astype(np.float16)
        if not np.isfinite(rounded).all():
            raise OverflowError(f"weight {value.name} is too large for float16")
        name = f"{value.name}/float16"
        stored = ir.Value(name=name, const_value=ir.tensor(rounded, name=name), shape=value.shape)
        stored.dtype = ir.DataType.FLOAT16
        cast = ir.node("Cast", [stored], {"to": int(ir.DataType.FLOAT)})
        del graph.initializers[str(value.name)]
        value.replace_all_uses_with(cast.outputs[0])
        cast.outputs[0].name, value.name = value.name, f"{value.name}/float32"
        graph.register_initializer(stored)
        casts.append(cast)
    if casts:
        graph.insert_before(graph[0], casts)
