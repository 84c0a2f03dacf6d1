"""The ONNX graphs of the toy bundle, written node by node.

Rows are (B, ...); latents (B, 1, 8, 8), conditions one-hot (B, 1, 16), coefficients (B, 9) in the order of
``engines.sampler.Coefficients``. free: height and width of latents and images are left free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from engines.manifest import (
    CLEAN_ESTIMATE,
    COEFFICIENTS,
    CONDITION,
    FREE,
    GRID,
    GUIDANCE,
    IMAGE,
    KNOWN,
    LATENT,
    MASK,
    MASKED,
    NEXT_LATENT,
    NOISE,
    TIMESTEP,
    TOKENS,
    DType,
    TensorSpec,
)

LATENT_PX = 8
WIDTH = 16
SCALE = 8
_ELEMENT = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "uint8": TensorProto.UINT8}


@dataclass(frozen=True)
class ToyGraph:
    """A serialised model and its tensors as a manifest describes them."""

    serialised: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class _Builder:
    """Collects nodes and constants; every method returns the name of its result."""

    def __init__(self, *, free: bool = False) -> None:
        side = FREE if free else LATENT_PX
        self.latent = (-1, 1, side, side)
        self.image = (-1, FREE, FREE, 3) if free else (-1, SCALE * side, SCALE * side, 3)
        self._free = free
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}

    def const(self, value: NDArray[np.generic]) -> str:
        name = f"const_{len(self._constants)}"
        self._constants[name] = numpy_helper.from_array(value, name)
        return name

    def scalar(self, value: float) -> str:
        return self.const(np.array(value, np.float32))

    def ints(self, *values: int) -> str:
        return self.const(np.array(values, np.int64))

    def op(self, kind: str, *inputs: str, result: str = "", **attributes: Any) -> str:
        name = result or f"{kind.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def plane(self, rows: str) -> str:
        """(B,) as (B, 1, h, w)."""
        column = self.op("Reshape", rows, self.ints(-1, 1, 1, 1))
        if self._free:
            ones = self.op("Add", self.op("Mul", LATENT, self.scalar(0)), self.scalar(1))
        else:
            ones = self.const(np.ones((1, 1, LATENT_PX, LATENT_PX), np.float32))
        return self.op("Mul", column, ones)

    def pattern(self, rng: np.random.Generator) -> str:
        """Of the class, (B, 1, h, w): drawn by position, or where those are free one level alone."""
        if self._free:
            return self.plane(self.op("MatMul", CONDITION, self.const(_draw(rng, (WIDTH, 1)))))
        drawn = self.op("MatMul", CONDITION, self.const(_draw(rng, (WIDTH, LATENT_PX**2))))
        return self.op("Reshape", drawn, self.ints(*self.latent))

    def finish(self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> ToyGraph:
        graph = helper.make_graph(
            self._nodes,
            "toy",
            [_info(t) for t in inputs],
            [_info(t) for t in outputs],
            list(self._constants.values()),
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return ToyGraph(model.SerializeToString(deterministic=True), inputs, outputs)


def condition_graph() -> ToyGraph:
    """tokens (B, 1) int64 → condition (B, 1, 16) float32, one-hot."""
    build = _Builder()
    depth, values = build.const(np.array(WIDTH, np.int64)), build.const(np.array([0, 1], np.float32))
    build.op("OneHot", TOKENS, depth, values, result=CONDITION)
    return build.finish((_spec(TOKENS, (-1, 1), "int64"),), (_spec(CONDITION, (-1, 1, WIDTH)),))


def decode_graph(*, free: bool = False) -> ToyGraph:
    """latent (B, 1, 8, 8) in [-1, 1] → image (B, 64, 64, 3) uint8, each pixel repeated 8 × 8 times."""
    build = _Builder(free=free)
    bounded = build.op("Clip", LATENT, build.scalar(-1), build.scalar(1))
    scaled = build.op("Mul", build.op("Add", bounded, build.scalar(1)), build.scalar(127.5))
    scales = build.const(np.array([1, 1, SCALE, SCALE], np.float32))
    large = build.op("Resize", build.op("Round", scaled), "", scales, mode="nearest")
    colour = build.op("Concat", large, large, large, axis=1)
    pixels = build.op("Transpose", colour, perm=[0, 2, 3, 1])
    build.op("Cast", pixels, result=IMAGE, to=TensorProto.UINT8)
    return build.finish((_spec(LATENT, build.latent),), (_spec(IMAGE, build.image, "uint8"),))


def encode_graph(*, free: bool = False) -> ToyGraph:
    """image (B, 64, 64, 3) uint8 → latent (B, 1, 8, 8): the mean luma of each 8 × 8 block, in [-1, 1]."""
    build = _Builder(free=free)
    planes = build.op("Transpose", build.op("Cast", IMAGE, to=TensorProto.FLOAT), perm=[0, 3, 1, 2])
    luma = np.array([0.299, 0.587, 0.114], np.float32).reshape(1, 3, 1, 1)
    if free:
        weight = np.broadcast_to(luma / SCALE**2, (1, 3, SCALE, SCALE)).copy()
        grey = build.op("Conv", planes, build.const(weight), strides=[SCALE, SCALE])
    else:
        blocks = build.op("Reshape", planes, build.ints(-1, 3, LATENT_PX, SCALE, LATENT_PX, SCALE))
        means = build.op("ReduceMean", blocks, build.ints(3, 5), keepdims=0)
        grey = build.op("Conv", means, build.const(luma))
    build.op("Sub", build.op("Div", grey, build.scalar(127.5)), build.scalar(1), result=LATENT)
    return build.finish((_spec(IMAGE, build.image, "uint8"),), (_spec(LATENT, build.latent),))


def step_graph(
    *,
    seed: int,
    channels: int,
    depth: int,
    nan_class: int | None,
    grid: bool,
    seeing: bool = False,
    free: bool = False,
) -> ToyGraph:
    """One denoising step of a network drawn from ``seed``; see ``ToyOptions`` for the rest."""
    build = _Builder(free=free)
    row = build.latent
    out = _network(build, np.random.default_rng(seed), channels, depth, grid, seeing)
    if nan_class is not None:
        out = _poison(build, out, nan_class)
    _update(build, out, blend=not seeing)
    behind = MASKED if seeing else KNOWN
    names = (LATENT, TIMESTEP, GUIDANCE, CONDITION, COEFFICIENTS, NOISE, behind, MASK)
    shapes = (row, (-1,), (-1,), (-1, 1, WIDTH), (-1, 9), row, row, row)
    inputs = tuple(_spec(name, shape) for name, shape in zip(names, shapes, strict=True))
    if grid:
        inputs += (_spec(GRID, (-1,)),)
    return build.finish(inputs, (_spec(NEXT_LATENT, row), _spec(CLEAN_ESTIMATE, row)))


def _network(build: _Builder, rng: np.random.Generator, channels: int, depth: int, grid: bool, seeing: bool) -> str:
    """The v-prediction, (B, 1, 8, 8): convolutions of the latent, a class pattern times w, and the time."""
    pattern = build.pattern(rng)
    strength = build.op("Add", build.op("Mul", build.plane(GUIDANCE), build.scalar(0.2)), build.scalar(1))
    time = build.op("Mul", build.plane(TIMESTEP), build.scalar(1e-3))
    planes = [LATENT, build.op("Mul", pattern, strength), time]
    if grid:
        planes.append(build.op("Log", build.plane(GRID)))
    if seeing:
        planes += [MASK, MASKED]
    hidden = build.op("Concat", *planes, axis=1)
    width = len(planes)
    for _ in range(depth):
        weight = build.const(_draw(rng, (channels, width, 3, 3)) / np.float32(np.sqrt(9 * width)))
        hidden = build.op("Tanh", build.op("Conv", hidden, weight, pads=[1, 1, 1, 1]))
        width = channels
    weight = build.const(_draw(rng, (1, width, 3, 3)) / np.float32(np.sqrt(9 * width)))
    return build.op("Conv", hidden, weight, pads=[1, 1, 1, 1])


def _poison(build: _Builder, out: str, nan_class: int) -> str:
    """NaN in the rows whose condition is this class, the others unchanged."""
    picked = build.op("Gather", CONDITION, build.const(np.array(nan_class, np.int64)), axis=2)
    chosen = build.op("Greater", build.plane(picked), build.scalar(0.5))
    return build.op("Where", chosen, build.scalar(float("nan")), out)


def _update(build: _Builder, out: str, blend: bool) -> None:
    """Clean estimate, affine update and blend, as ``engines.sampler`` writes them."""
    p, q, r, a, b, d, c, e, f = (
        build.op(
            "Reshape", build.op("Gather", COEFFICIENTS, build.const(np.array(i)), axis=1), build.ints(-1, 1, 1, 1)
        )
        for i in range(9)
    )

    def weighted(*terms: tuple[str, str]) -> str:
        products = [build.op("Mul", factor, tensor) for factor, tensor in terms]
        total = products[0]
        for product in products[1:]:
            total = build.op("Add", total, product)
        return total

    estimate = weighted((p, LATENT), (q, out))
    build.op("Max", build.op("Min", estimate, r), build.op("Neg", r), result=CLEAN_ESTIMATE)
    y = weighted((a, LATENT), (b, CLEAN_ESTIMATE), (d, out), (c, NOISE))
    if not blend:
        build.op("Identity", y, result=NEXT_LATENT)
        return
    known = weighted((e, KNOWN), (f, NOISE))
    outside = build.op("Sub", build.scalar(1), MASK)
    build.op("Add", build.op("Mul", MASK, y), build.op("Mul", outside, known), result=NEXT_LATENT)


def _draw(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return rng.standard_normal(shape, dtype=np.float32)


def _spec(name: str, shape: tuple[int, ...], dtype: DType = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def _info(spec: TensorSpec) -> onnx.ValueInfoProto:
    shape = [f"{spec.name}_{axis}" if axis and size == FREE else size for axis, size in enumerate(spec.shape)]
    shape[0] = "batch"
    return helper.make_tensor_value_info(spec.name, _ELEMENT[spec.dtype], shape)
