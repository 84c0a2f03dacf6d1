"""Weights rounded to float16 and kept in it: half the file. A graph casts them back, its arithmetic is float32.

What embeds the guidance weight, the timestep and SDXL's added conditions keeps its weights, as it does its
arithmetic in every engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import nn

from engines.manifest import Parity

LEAST_NUMBERS = 1024
"""Constants of fewer stay as they are: nothing is saved."""

ROUNDED_LIMIT: Final = 1e-2
"""How far rounding may move an output, as a share of its largest value: far more than it is seen to."""

_WHOLE = frozenset({"time_embedding", "add_embedding"})


@torch.no_grad()
def round_weights(module: nn.Module) -> None:
    """Round a module's weights in place, to numbers that float16 has.

    Raises: OverflowError naming a weight beyond its 65,504.
    """
    for name, weight in module.named_parameters():
        if weight.dtype != torch.float32 or not _WHOLE.isdisjoint(name.split(".")):
            continue
        rounded = weight.half()
        if not torch.isfinite(rounded).all():
            raise OverflowError(f"weight {name} is too large for float16")
        weight.copy_(rounded)


def rounding(
    exact: Sequence[NDArray[np.float64]], rounded: Sequence[NDArray[np.float64]], reference: str
) -> Parity:
    """How far rounding moved the outputs, one array each. Raises: ArithmeticError beyond ROUNDED_LIMIT."""
    moved = [np.abs(there - here) for here, there in zip(exact, rounded, strict=True)]
    for here, by in zip(exact, moved, strict=True):
        share = float(by.max()) / max(float(np.abs(here).max()), 1e-12)
        if not share <= ROUNDED_LIMIT:
            raise ArithmeticError(f"weights in float16 move an output by {share:.2g} of its largest value")
    return Parity(
        reference=reference,
        max_abs_error=max(float(by.max()) for by in moved),
        mean_abs_error=float(np.mean([by.mean() for by in moved])),
        rows=len(exact[0]),
    )


def keep_in_float16(graph: ir.Graph) -> None:
    """Change ``graph`` so that large float32 constants which float16 has exactly are stored in it, and cast."""
    casts = []
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < LEAST_NUMBERS:
            continue
        numbers = tensor.numpy()
        with np.errstate(over="ignore"):
            half = numbers.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), numbers):
            continue
        kept = ir.Value(name=f"{value.name}/kept", const_value=ir.tensor(half), shape=value.shape)
        kept.dtype = ir.DataType.FLOAT16
        cast = ir.node("Cast", [kept], {"to": int(ir.DataType.FLOAT)})
        del graph.initializers[str(value.name)]
        value.replace_all_uses_with(cast.outputs[0])
        cast.outputs[0].name, value.name = value.name, f"{value.name}/replaced"
        graph.register_initializer(kept)
        casts.append(cast)
    if casts:
        graph.insert_before(graph[0], casts)
