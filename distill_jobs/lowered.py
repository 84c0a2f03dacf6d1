"""What a network gives where its products are in fewer bits: engines' way of lowering, emulated on any CPU.

Engines cast before and after each convolution and matrix product, which sum in float32, and leave the rest alone
(``engines.backends.lowering``). Rounding what goes in and what comes out is the same arithmetic, but for the order
of the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from engines.manifest import Lowered, Parity

HEADROOM = 4
"""How many times larger products of other rows may be than those of the rows at hand, and still fit a type."""

_DTYPES: dict[Lowered, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_ATEN = torch.ops.aten
_PRODUCTS = frozenset(
    {
        _ATEN.convolution.default,
        _ATEN.mm.default,
        _ATEN.addmm.default,
        _ATEN.bmm.default,
        _ATEN.baddbmm.default,
    }
)


class WatchedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees whether every product is finite, which an 8-bit image does not tell; rounds them where a type is given.

    finite: False once a product was not, or left the type less than HEADROOM. dtype: what inputs and outputs of
    products are rounded to.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.finite = True
        self._dtype = dtype
        self._largest = torch.finfo(dtype).max / HEADROOM if dtype else torch.finfo(torch.float32).max

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _PRODUCTS:
            return func(*args, **(kwargs or {}))
        out = self._rounded(func(*tree_map(self._rounded, args), **(kwargs or {})))
        self.finite = self.finite and bool((out.abs() <= self._largest).all())
        return out

    def _rounded(self, value: Any) -> Any:
        floats = isinstance(value, Tensor) and value.dtype == torch.float32
        return value.to(self._dtype).to(torch.float32) if floats and self._dtype else value


def lowered_parity(
    module: nn.Module, rows: Sequence[Tensor], expected: Sequence[NDArray[np.float64]], dtype: Lowered
) -> Parity | None:
    """How far the module is from its float32 outputs with its products in ``dtype``; None where that overflows.

    rows: one tensor an input; expected: one array an output.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), WatchedProducts(_DTYPES[dtype]) as products:
        result = module.eval()(*rows)
    outputs = [t.numpy().astype(np.float64) for t in (result if isinstance(result, tuple) else (result,))]
    if not products.finite or not all(np.isfinite(output).all() for output in outputs):
        return None
    errors = [np.abs(output - want) for output, want in zip(outputs, expected, strict=True)]
    return Parity(
        reference=f"torch {torch.__version__.split('+')[0]} float32",
        max_abs_error=max(float(error.max()) for error in errors),
        mean_abs_error=float(np.mean([error.mean() for error in errors])),
        rows=len(rows[0]),
    )
