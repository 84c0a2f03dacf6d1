"""Calls of fixed batch sizes on a CUDA device: rows at fixed addresses, one stream, graphs by rung and size."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from engines.backends.base import Rows
from engines.backends.cuda import says_out_of_memory
from engines.calls import Shapes, row_shapes
from engines.errors import BackendError, OutOfMemoryError
from engines.manifest import GraphSpec, Size

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "int64": torch.int64, "uint8": torch.uint8}
_log = logging.getLogger(__name__)

Enqueue = Callable[[], None]
"""Puts one call on the current stream: reads the inputs and writes the outputs of the rows it was made for."""


class CudaRows:
    """Inputs and outputs of a graph for ``rung`` rows of images of one size.

    shapes: of one row. size: number of it among those that the engine is made ready for.
    inputs, outputs: where the engine reads and writes, on the device; each has a page-locked copy on the host, so
    that both ways are asynchronous. None of them ever moves: a CUDA graph holds their addresses.
    """

    def __init__(self, spec: GraphSpec, rung: int, device: str, shapes: Shapes, size: int = 0) -> None:
        self.rung = rung
        self.size = size
        pinned = device == "cuda"
        host = {
            tensor.name: torch.zeros((rung, *shapes[tensor.name]), dtype=_DTYPES[tensor.dtype], pin_memory=pinned)
            for tensor in (*spec.inputs, *spec.outputs)
        }
        self.inputs = {tensor.name: torch.zeros_like(host[tensor.name], device=device) for tensor in spec.inputs}
        self.outputs = {tensor.name: torch.zeros_like(host[tensor.name], device=device) for tensor in spec.outputs}
        self._host = host
        self._views: dict[str, NDArray[Any]] = {name: tensor.numpy() for name, tensor in host.items()}

    def upload(self, rows: Rows) -> None:
        """Put at most ``rung`` rows on the device; the first of them fills up what is missing."""
        for name, tensor in self.inputs.items():
            view, array = self._views[name], rows[name]
            view[: len(array)] = array
            view[len(array) :] = array[:1]
            tensor.copy_(self._host[name], non_blocking=True)

    def download(self) -> None:
        """Bring the outputs to the host; they are there once the stream is synchronised."""
        for name, tensor in self.outputs.items():
            self._host[name].copy_(tensor, non_blocking=True)

    def taken(self, count: int) -> dict[str, NDArray[Any]]:
        """The first ``count`` rows of what was downloaded, the caller's own."""
        return {name: self._views[name][:count].copy() for name in self.outputs}


class _Ready(NamedTuple):
    """A batch size of images of one size. call: ``enqueue``, or its graph's replay, which needs what that holds."""

    rows: CudaRows
    enqueue: Enqueue
    call: Enqueue


class Ladder:
    """Runs any number of rows as calls of fixed batch sizes, each made ready when it first comes.

    sizes: of images to be ready for, where the graph takes several. make: prepares the engine for rows of one batch
    size, of images of one size, and gives its call. capture: keep each call as a CUDA graph, which replays with one
    launch. device: cuda, or cpu to rehearse without graphs.

    All graphs share one pool of memory for what they compute on the way: calls follow each other on one stream, and
    outputs are copied to rows outside it. Smaller batches fit into what a larger one took before them, and not the
    other way round: a larger one releases those made ready before it, which are made again when they come.
    """

    def __init__(
        self,
        spec: GraphSpec,
        rungs: Sequence[int],
        make: Callable[[CudaRows], Enqueue],
        *,
        capture: bool,
        sizes: Sequence[Size] = (),
        device: str = "cuda",
    ) -> None:
        self._spec = spec
        self._shapes = row_shapes(spec, sizes)
        self._rungs = tuple(rungs)
        self._make = make
        self._capture = capture
        self._device = device
        self.stream = torch.cuda.Stream() if device == "cuda" else None  # type: ignore[no-untyped-call]
        self._pool: Any = None
        self._broken: list[Any] = []
        """Graphs whose capture never ended: torch may still ask them whether a stream is theirs."""
        self._calls: dict[tuple[int, int], _Ready] = {}
        self.captured: dict[int, bool] = {}
        """Whether each batch size made ready so far replays a graph, at every size of image it was made for."""

    def run(self, rows: Rows) -> dict[str, NDArray[Any]]:
        """All outputs of the rows.

        Raises: OutOfMemoryError; BackendError naming an input of another dtype or shape.
        """
        count, largest = len(rows[self._spec.inputs[0].name]), self._rungs[-1]
        size = check_rows(self._spec, self._shapes, rows)
        try:
            pieces = [
                self._run(size, {t.name: rows[t.name][first : first + largest] for t in self._spec.inputs})
                for first in range(0, count, largest)
            ]
        except (BackendError, RuntimeError) as error:
            if not says_out_of_memory(error):
                raise
            raise OutOfMemoryError(
                f"{self._spec.file} finds no memory for {min(count, largest)} rows: give smaller --rungs, or a "
                f"lower --precision ({error})"
            ) from error
        if len(pieces) == 1:
            return pieces[0]
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}

    def release(self) -> None:
        """Free rows and graphs, once what is under way is done; each batch size has its own made again."""
        if self.stream is not None:
            self.stream.synchronize()
        self._calls.clear()
        self._pool = None
        if self.stream is not None:
            torch.cuda.empty_cache()  # TensorRT allocates beside torch

    def _run(self, size: int, piece: Rows) -> dict[str, NDArray[Any]]:
        count = len(piece[self._spec.inputs[0].name])
        rung = next(rung for rung in self._rungs if rung >= count)
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            if (rung, size) not in self._calls:
                self._calls[rung, size] = self._ready(rung, size)
            ready = self._calls[rung, size]
            ready.rows.upload(piece)
            ready.call()
            ready.rows.download()
        if self.stream is not None:
            self.stream.synchronize()
        return ready.rows.taken(count)

    def _ready(self, rung: int, size: int) -> _Ready:
        if self._capture and all(made < rung for made, _ in self._calls):
            self.release()
        rows = CudaRows(self._spec, rung, self._device, self._shapes[size], size)
        replay = self._captured(rows, enqueue := self._make(rows))
        self.captured[rung] = replay is not None and self.captured.get(rung, True)
        return _Ready(rows, enqueue, replay or enqueue)

    def _captured(self, rows: CudaRows, enqueue: Enqueue) -> Enqueue | None:
        """The call as a graph's replay; None where it is not to be, or cannot be, captured."""
        if self.stream is None or not self._capture:
            return None
        enqueue()  # what a first call allocates and compiles is not to be captured
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, self._pool, self.stream, capture_error_mode="thread_local"):
                enqueue()
        except (BackendError, RuntimeError) as error:
            self._abandon(graph)
            if says_out_of_memory(error):
                raise
            _log.warning("%s runs %d rows without a CUDA graph: %s", self._spec.file, rows.rung, error)
            return None
        replay: Enqueue = graph.replay
        return replay

    def _abandon(self, graph: Any) -> None:
        """End a broken capture, and begin the next one in a pool of its own.

        Where CUDA refuses to end it, torch takes it for one that is under way: it would refuse the pool to others,
        and give no memory back to the device any more.
        Source: CUDAGraph::capture_end, release_cached_blocks of torch's CUDACachingAllocator.
        """
        pool, self._pool, device = self._pool, None, torch.cuda.current_device()
        try:
            torch._C._cuda_endAllocateToPool(device, pool)
        except RuntimeError:
            return  # it did end, as where it was the call that failed
        torch._C._cuda_releasePool(device, pool)
        self._broken.append(graph)


def check_rows(spec: GraphSpec, shapes: Sequence[Shapes], rows: Rows) -> int:
    """Which of the shapes the rows have. Raises: BackendError naming an input of another dtype or shape."""
    wrong = [list(_wrong(spec, each, rows)) for each in shapes]
    if [] in wrong:
        return wrong.index([])
    reason = min(wrong, key=len)[0]
    raise BackendError(reason if len(shapes) == 1 else f"rows are of none of the {len(shapes)} sizes: {reason}")


def _wrong(spec: GraphSpec, shapes: Shapes, rows: Rows) -> Iterator[str]:
    count = len(rows[spec.inputs[0].name])
    for tensor in spec.inputs:
        array, shape = rows[tensor.name], (count, *shapes[tensor.name])
        if array.shape != shape or array.dtype != np.dtype(tensor.dtype):
            yield f"{tensor.name} must be {tensor.dtype} of {shape}, not {array.dtype} of {array.shape}"
