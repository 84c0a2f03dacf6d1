"""ONNX operators as torch functions: those our exporter emits, in the meaning of opset 21.

Each function takes the node's inputs (None where one is left out), then its attributes by name, and returns a
tensor or a tuple of tensors. Tensors that describe shapes are on the CPU, whatever device the others are on; where
they are known ahead, they may be given as numbers.
Source: https://onnx.ai/onnx/operators
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (the field's name for it)

Operator = Callable[..., Any]
Numbers = Tensor | list[Any]
"""Of a shape, in one dimension."""
Number = Tensor | int | float


def _ints(numbers: Numbers) -> list[int]:
    return [int(value) for value in (numbers.tolist() if isinstance(numbers, Tensor) else numbers)]


def _floats(numbers: Numbers | None) -> list[float]:
    """None of what is left out."""
    if numbers is None:
        return []
    return [float(value) for value in (numbers.tolist() if isinstance(numbers, Tensor) else numbers)]


def _dtype(code: int) -> torch.dtype:
    if code == onnx.TensorProto.BFLOAT16:
        return torch.bfloat16  # numpy has no such type
    return torch.from_numpy(np.empty(0, onnx.helper.tensor_dtype_to_np_dtype(code))).dtype


def _variadic(function: Operator) -> Operator:
    return lambda *inputs: reduce(function, inputs)


# ---- products and normalisations


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """As many products as there are rows: one product of all rows would round by how many they are."""
    if b.ndim != 2 or a.ndim < 2:
        return torch.matmul(a, b)
    rows = a.reshape(len(a), -1, a.shape[-1])
    return torch.bmm(rows, b.expand(len(a), *b.shape)).reshape(*a.shape[:-1], b.shape[-1])


def _gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    product = alpha * _matmul(a.T if transA else a, b.T if transB else b)
    return product if c is None else product + beta * c


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """Spelt out: torch's own rounds the last elements of a tensor differently."""
    if approximate != "none":
        raise NotImplementedError(f"Gelu with approximate={approximate}")
    return x * (0.5 * (1.0 + torch.erf(x * 0.5**0.5)))


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: tuple[int, ...] = (1, 1),
    pads: tuple[int, ...] = (0, 0, 0, 0),
    dilations: tuple[int, ...] = (1, 1),
    group: int = 1,
    auto_pad: str = "NOTSET",
    kernel_shape: tuple[int, ...] = (),
) -> Tensor:
    del kernel_shape  # the weight says it too
    if auto_pad != "NOTSET" or x.ndim != 4:
        raise NotImplementedError("Conv other than two-dimensional with explicit pads")
    top, left, bottom, right = pads
    if (top, left) == (bottom, right):
        return F.conv2d(x, weight, bias, strides, (top, left), dilations, group)
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, strides, 0, dilations, group)


def _group_norm(
    x: Tensor, scale: Tensor, bias: Tensor, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    del stash_type  # float32, as everything here
    return F.group_norm(x, num_groups, scale, bias, epsilon)


def _layer_norm(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    del stash_type
    return F.layer_norm(x, x.shape[axis:], scale, bias, epsilon)


# ---- shapes


def _reshape(x: Tensor, shape: Numbers, allowzero: int = 0) -> Tensor:
    sizes = _ints(shape)
    if not allowzero:
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


def _unsqueeze(x: Tensor, axes: Numbers) -> Tensor:
    rank = x.ndim + len(axes)
    for axis in sorted(a % rank for a in _ints(axes)):
        x = x.unsqueeze(axis)
    return x


def _reduce_mean(
    x: Tensor, axes: Numbers | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    if axes is None or not len(axes):
        return x if noop_with_empty_axes else x.mean(tuple(range(x.dim())), bool(keepdims))
    return x.mean(tuple(_ints(axes)), bool(keepdims))


def _squeeze(x: Tensor, axes: Numbers | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(_ints(axes))


def _slice(
    x: Tensor, starts: Numbers, ends: Numbers, axes: Numbers | None = None, steps: Numbers | None = None
) -> Tensor:
    where = range(len(starts)) if axes is None else _ints(axes)
    strides = [1] * len(starts) if steps is None else _ints(steps)
    if any(stride < 1 for stride in strides):
        raise NotImplementedError("Slice that runs backwards")
    index = [slice(None)] * x.ndim
    for axis, start, end, stride in zip(where, _ints(starts), _ints(ends), strides, strict=True):
        bounds = slice(start, end, stride).indices(x.shape[axis])  # exporters write "to the end" as 2^63 - 1
        index[axis] = slice(*bounds)
    return x[tuple(index)]


def _split(x: Tensor, split: Numbers | None = None, axis: int = 0, num_outputs: int = 0) -> tuple[Tensor, ...]:
    if split is not None:
        return torch.split(x, _ints(split), axis)
    return torch.chunk(x, num_outputs, axis)


def _gather(x: Tensor, indices: Tensor, axis: int = 0) -> Tensor:
    picked = x.index_select(axis, (indices % x.shape[axis]).reshape(-1))
    return picked.reshape((*x.shape[: axis % x.ndim], *indices.shape, *x.shape[axis % x.ndim + 1 :]))


def _expand(x: Tensor, shape: Numbers) -> Tensor:
    return x * torch.ones(_ints(shape), dtype=x.dtype, device=x.device)


def _resize(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Numbers | None = None,
    sizes: Numbers | None = None,
    mode: str = "nearest",
    **_: Any,
) -> Tensor:
    """Nearest by whole factors, where all of ONNX's coordinate conventions agree.

    Images by powers of two, which its arithmetic has exactly, in one kernel, which keeps channels last.
    """
    del roi
    factors = _floats(scales) or [size / old for size, old in zip(_ints(sizes), x.shape, strict=True)]  # type: ignore[arg-type]
    if mode != "nearest" or any(factor != int(factor) for factor in factors):
        raise NotImplementedError("Resize other than nearest by whole factors")
    if x.ndim == 4 and factors[:2] == [1, 1] and all(int(factor).bit_count() == 1 for factor in factors):
        return F.interpolate(x, scale_factor=[float(factor) for factor in factors[2:]], mode="nearest")
    for axis, factor in enumerate(factors):
        x = x if factor == 1 else x.repeat_interleave(int(factor), axis)
    return x


def _pad(
    x: Tensor, pads: Numbers, value: Number | None = None, axes: Numbers | None = None, mode: str = "constant"
) -> Tensor:
    if mode != "constant":
        raise NotImplementedError(f"Pad with mode={mode}")
    padded = [axis % x.ndim for axis in (range(x.ndim) if axes is None else _ints(axes))]
    sizes = _ints(pads)
    pairs = dict(zip(padded, zip(sizes[: len(padded)], sizes[len(padded) :], strict=True), strict=True))
    widths = [size for axis in reversed(range(x.ndim)) for size in pairs.get(axis, (0, 0))]
    return F.pad(x, widths, value=0 if value is None else float(value))


# ---- values


def _range(start: Tensor, limit: Tensor, delta: Tensor, *, device: str) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype, device=device)


def _cumsum(x: Tensor, axis: Number, exclusive: int = 0, reverse: int = 0) -> Tensor:
    if exclusive or reverse:
        raise NotImplementedError("CumSum that is exclusive or runs backwards")
    return x.cumsum(int(axis), dtype=x.dtype)


def _argmax(x: Tensor, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """The first of equals, as torch takes it."""
    if select_last_index:
        raise NotImplementedError("ArgMax that takes the last of equals")
    return x.argmax(axis, bool(keepdims))


def _gather_nd(x: Tensor, indices: Tensor, batch_dims: int = 0) -> Tensor:
    if batch_dims:
        raise NotImplementedError(f"GatherND with batch_dims={batch_dims}")
    return x[indices.unbind(-1)]


def _one_hot(indices: Tensor, depth: Number, values: Tensor, axis: int = -1) -> Tensor:
    count = int(depth)
    hot = (indices % count).unsqueeze(-1) == torch.arange(count, device=indices.device)
    return torch.where(hot, values[1], values[0]).movedim(-1, axis)


def _cast(x: Tensor, to: int, saturate: int = 1) -> Tensor:
    del saturate  # concerns float8 only
    return x.to(_dtype(to))


def _div(a: Tensor, b: Tensor) -> Tensor:
    """Of whole numbers, as of lengths, a whole number."""
    return torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")


def _clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return x if low is None and high is None else torch.clamp(x, low, high)


SHAPE_INPUTS: dict[str, frozenset[int]] = {
    "CumSum": frozenset({1}),
    "Expand": frozenset({1}),
    "OneHot": frozenset({1}),
    "Pad": frozenset({1, 2, 3}),
    "Range": frozenset({0, 1, 2}),
    "ReduceMean": frozenset({1}),
    "Reshape": frozenset({1}),
    "Resize": frozenset({1, 2, 3}),
    "Slice": frozenset({1, 2, 3, 4}),
    "Split": frozenset({1}),
    "Squeeze": frozenset({1}),
    "Unsqueeze": frozenset({1}),
}
"""Inputs whose values decide shapes, by position: they are read on the CPU."""

MADE_OF_SHAPES: frozenset[str] = frozenset({"Range"})
"""Operators that make data of such values alone: they are told the device where it is to be."""

OPERATORS: dict[str, Operator] = {
    "Add": torch.add,
    "ArgMax": _argmax,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda *inputs, axis: torch.cat(inputs, axis),
    "Conv": _conv,
    "Cos": torch.cos,
    "CumSum": _cumsum,
    "Div": _div,
    "Equal": torch.eq,
    "Exp": torch.exp,
    "Expand": _expand,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "Greater": torch.gt,
    "GroupNormalization": _group_norm,
    "Identity": lambda x: x,
    "LayerNormalization": _layer_norm,
    "Log": torch.log,
    "MatMul": _matmul,
    "Max": _variadic(torch.maximum),
    "Min": _variadic(torch.minimum),
    "Mul": torch.mul,
    "Neg": torch.neg,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Range": _range,
    "ReduceMean": _reduce_mean,
    "Relu": torch.relu,
    "Reshape": _reshape,
    "Resize": _resize,
    "Round": torch.round,
    "Shape": lambda x, start=0, end=None: torch.tensor(x.shape[start:end]),
    "Sigmoid": torch.sigmoid,
    "Sin": torch.sin,
    "Slice": _slice,
    "Softmax": lambda x, axis=-1: torch.softmax(x, axis),
    "Split": _split,
    "Sqrt": torch.sqrt,
    "Squeeze": _squeeze,
    "Sub": torch.sub,
    "Tanh": torch.tanh,
    "Transpose": lambda x, perm: x.permute(perm),
    "Unsqueeze": _unsqueeze,
    "Where": torch.where,
}
