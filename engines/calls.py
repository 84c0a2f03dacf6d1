"""What engines are called with: a graph, at each size of image that its rows come in.

A graph of several sizes leaves height and width of its rows free. Everything made or measured ahead is made or
measured for each size; rows of different sizes never share a call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engines.manifest import IMAGE, BundleManifest, GraphSpec, Size, TensorSpec

Shapes = dict[str, tuple[int, ...]]
"""By tensor, the shape of one row."""


@dataclass(frozen=True)
class Call:
    """A graph at one size. free: the graph takes others, too."""

    graph: str
    size: Size
    free: bool

    def __str__(self) -> str:
        """As costs and tables name it: ``step_4``, or ``step_4@768x512`` of a graph that takes several sizes."""
        return f"{self.graph}@{self.size}" if self.free else self.graph


def call_of(manifest: BundleManifest, graph: str, size: Size) -> Call:
    """A graph's call for rows of this size."""
    return Call(graph, size, manifest.graphs[graph].free)


def calls(manifest: BundleManifest) -> Iterator[Call]:
    """Every graph at every size; once where its shapes are fixed."""
    for graph, spec in manifest.graphs.items():
        for size in manifest.sizes if spec.free else manifest.sizes[:1]:
            yield Call(graph, size, spec.free)


def row_shape(tensor: TensorSpec, size: Size) -> tuple[int, ...]:
    """Of one row at this size."""
    if not tensor.free:
        return tensor.shape[1:]
    if tensor.name == IMAGE:
        return (size.height, size.width, tensor.shape[3])
    return (tensor.shape[1], size.latent_height, size.latent_width)


def row_shapes(spec: GraphSpec, sizes: Sequence[Size]) -> tuple[Shapes, ...]:
    """Of a graph's inputs and outputs: for each size, or one alone where they are fixed.

    Raises: ValueError where they are free and there is no size.
    """
    tensors = (*spec.inputs, *spec.outputs)
    if not spec.free:
        return ({tensor.name: tensor.shape[1:] for tensor in tensors},)
    if not sizes:
        raise ValueError(f"{spec.file} leaves the size of its rows free: say which sizes to be ready for")
    return tuple({tensor.name: row_shape(tensor, size) for tensor in tensors} for size in sizes)
