"""The GPU's rows and calls, rehearsed on the CPU: batches of a ladder, graphs, and what finds no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engines.backends.cuda_rows import CudaRows, Enqueue, Ladder, check_rows
from engines.calls import row_shapes
from engines.errors import BackendError, OutOfMemoryError
from engines.manifest import GraphSpec, Parity, TensorSpec

SPEC = GraphSpec(
    file="sum.onnx",
    inputs=(
        TensorSpec(name="a", dtype="float32", shape=(-1, 2)),
        TensorSpec(name="tokens", dtype="int64", shape=(-1,)),
    ),
    outputs=(TensorSpec(name="sum", dtype="float32", shape=(-1,)),),
    parity=Parity(reference="none", max_abs_error=0, mean_abs_error=0, rows=0),
)
RUNGS = (1, 2, 4)


class Summing:
    """An engine of fixed batch sizes that adds up each row; tells which sizes it ran."""

    def __init__(self) -> None:
        self.made: list[int] = []
        self.ran: list[int] = []

    def make(self, rows: CudaRows) -> Enqueue:
        self.made.append(rows.rung)

        def enqueue() -> None:
            self.ran.append(rows.rung)
            rows.outputs["sum"].copy_(rows.inputs["a"].sum(1) + rows.inputs["tokens"])

        return enqueue


@pytest.mark.parametrize(("count", "ran"), [(1, [1]), (2, [2]), (3, [4]), (4, [4]), (5, [4, 1]), (11, [4, 4, 4])])
def test_rows_run_as_batches_of_the_ladder(count: int, ran: list[int]) -> None:
    engine = Summing()
    ladder = Ladder(SPEC, RUNGS, engine.make, capture=True, device="cpu")
    a, tokens = np.random.default_rng(0).random((count, 2), dtype=np.float32), np.arange(count)
    for _ in range(2):
        np.testing.assert_allclose(ladder.run({"a": a, "tokens": tokens})["sum"], a.sum(1) + tokens, rtol=1e-6)
    assert engine.ran == ran * 2
    assert engine.made == sorted(set(ran), key=ran.index)
    assert ladder.captured == dict.fromkeys(engine.made, False)


# ---- graphs, with a capture of the test's own


class FakeGraph:
    """Holds what was put on the stream while it was captured."""

    def __init__(self) -> None:
        self.held: list[Enqueue] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for each in self.held:
            each()


class FakeCuda:
    """torch.cuda's streams and graphs, as far as a ladder uses them: what is captured does not run until replayed.

    pools: each capture's, in order. recording: those that captures under way allocate from. broken: raised by a
    capture's end, as CUDA does for what cannot be captured; torch then leaves the capture under way.
    """

    def __init__(self) -> None:
        self.graphs: list[FakeGraph] = []
        self.pools: list[int] = []
        self.recording: list[int] = []
        self.released: list[int] = []
        self.handles = iter(range(1, 100))
        self.capturing: FakeGraph | None = None
        self.broken: Exception | None = None

    def graph_pool_handle(self) -> int:
        return next(self.handles)

    @contextmanager
    def graph(self, graph: FakeGraph, pool: int, stream: Any, capture_error_mode: str) -> Iterator[None]:
        self.pools.append(pool)
        self.recording.append(pool)
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None
            if self.broken is not None:
                raise self.broken
            self.recording.remove(pool)
        self.graphs.append(graph)

    def end_allocate_to_pool(self, device: int, pool: int) -> None:
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def release_pool(self, device: int, pool: int) -> None:
        self.released.append(pool)


class Captured(Summing):
    """Summing on that device. refuses: raised while it is captured. full: raised for ``too_many`` rows."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda = cuda
        self.refuses: Exception | None = None
        self.too_many = 1000
        self.full: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def make(self, rows: CudaRows) -> Enqueue:
        compute = super().make(rows)

        def enqueue() -> None:
            if rows.rung >= self.too_many:
                raise self.full
            if self._cuda.capturing is None:
                compute()
            elif self.refuses is not None:
                raise self.refuses
            else:
                self._cuda.capturing.held.append(compute)

        return enqueue


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    cuda = FakeCuda()
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", cuda.graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", cuda.graph_pool_handle)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", cuda.end_allocate_to_pool, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", cuda.release_pool, raising=False)
    return cuda


def ladder_of(engine: Summing) -> Ladder:
    ladder = Ladder(SPEC, RUNGS, engine.make, capture=True, device="cpu")
    ladder.stream = SimpleNamespace(synchronize=lambda: None)  # type: ignore[assignment]
    return ladder


def check_sums(ladder: Ladder, count: int) -> None:
    a, tokens = np.random.default_rng(count).random((count, 2), dtype=np.float32), np.arange(count)
    np.testing.assert_allclose(ladder.run({"a": a, "tokens": tokens})["sum"], a.sum(1) + tokens, rtol=1e-6)


def test_calls_replay_graphs_of_one_pool_which_the_largest_of_them_began(fake_cuda: FakeCuda) -> None:
    engine = Captured(fake_cuda)
    ladder = ladder_of(engine)
    for count in (4, 1, 1, 2, 4, 2):
        check_sums(ladder, count)
    assert engine.made == [4, 1, 2]
    assert fake_cuda.pools == [1, 1, 1]
    assert [graph.replays for graph in fake_cuda.graphs] == [2, 2, 2]
    assert ladder.captured == dict.fromkeys(RUNGS, True)
    ladder.release()
    check_sums(ladder, 1)
    assert (engine.made, fake_cuda.pools) == ([4, 1, 2, 1], [1, 1, 1, 2])


def test_a_larger_batch_begins_a_pool_into_which_smaller_ones_come_again(fake_cuda: FakeCuda) -> None:
    engine = Captured(fake_cuda)
    ladder = ladder_of(engine)
    for count in (1, 2, 4, 2, 1, 4):
        check_sums(ladder, count)
    assert engine.made == [1, 2, 4, 2, 1], "no batch was made ready before it came"
    assert fake_cuda.pools == [1, 2, 3, 3, 3]


@pytest.mark.parametrize("refusal", [BackendError("refused"), RuntimeError("refused")])
def test_what_cannot_be_captured_runs_without_a_graph(
    fake_cuda: FakeCuda, caplog: pytest.LogCaptureFixture, refusal: Exception
) -> None:
    engine = Captured(fake_cuda)
    ladder = ladder_of(engine)
    engine.refuses, fake_cuda.broken = refusal, RuntimeError("capture broken")
    check_sums(ladder, 4)
    engine.refuses = fake_cuda.broken = None
    check_sums(ladder, 1)
    check_sums(ladder, 4)
    assert ladder.captured == {4: False, 1: True}
    assert fake_cuda.pools == [1, 2], "the pool of a broken capture is not recorded into again"
    assert (fake_cuda.recording, fake_cuda.released) == ([], [1]), "or torch takes its capture to be under way"
    assert "sum.onnx runs 4 rows without a CUDA graph: capture broken" in caplog.text


def test_a_refusal_is_quoted_where_the_capture_itself_ends_well(
    fake_cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Captured(fake_cuda)
    engine.refuses = BackendError("the engine does not run 4 rows")
    check_sums(ladder_of(engine), 4)
    assert "without a CUDA graph: the engine does not run 4 rows" in caplog.text
    assert fake_cuda.released == [], "the graph's own, when it goes"


@pytest.mark.parametrize(
    "full",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        BackendError(
            "the engine gives no execution context: Error Code 2: OutOfMemory (Requested size was 9 bytes.)"
        ),
    ],
    ids=["torch", "CUDA", "cuBLAS", "TensorRT"],
)
def test_a_batch_without_memory_is_told_from_what_fails_and_smaller_ones_run(
    fake_cuda: FakeCuda, full: Exception
) -> None:
    engine = Captured(fake_cuda)
    engine.too_many, engine.full = 4, full
    ladder = ladder_of(engine)
    check_sums(ladder, 2)
    with pytest.raises(
        OutOfMemoryError, match=r"sum\.onnx finds no memory for 4 rows: give smaller --rungs"
    ) as told:
        check_sums(ladder, 4)
    assert told.value.__cause__ is full
    check_sums(ladder, 2)
    assert ladder.captured == {2: True}
    engine.full = BackendError("no such kernel")
    with pytest.raises(BackendError, match="no such kernel"):
        check_sums(ladder, 4)


def test_a_graph_without_memory_is_not_run_without_one(fake_cuda: FakeCuda) -> None:
    engine = Captured(fake_cuda)
    engine.refuses = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(OutOfMemoryError):
        check_sums(ladder_of(engine), 4)


# ---- rows


def test_missing_rows_are_filled_up_with_the_first() -> None:
    [shapes] = row_shapes(SPEC, ())
    rows = CudaRows(SPEC, 4, "cpu", shapes)
    rows.upload({"a": np.ones((4, 2), np.float32), "tokens": np.full(4, 9)})
    rows.upload({"a": np.zeros((2, 2), np.float32), "tokens": np.array([5, 6])})
    assert rows.inputs["tokens"].tolist() == [5, 6, 5, 5]


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("a", np.zeros((2, 3), np.float32), r"a must be float32 of \(2, 2\), not float32 of \(2, 3\)"),
        ("a", np.zeros((2, 2)), "a must be float32 of .* not float64"),
        ("tokens", np.zeros((3,), np.int64), r"tokens must be int64 of \(2,\), not int64 of \(3,\)"),
        ("tokens", np.zeros((2,), np.int32), "tokens must be int64 of .* not int32"),
    ],
)
def test_rows_of_another_shape_or_type_are_named(name: str, array: np.ndarray, message: str) -> None:
    rows = {"a": np.zeros((2, 2), np.float32), "tokens": np.zeros(2, np.int64), name: array}
    with pytest.raises(BackendError, match=message):
        check_rows(SPEC, row_shapes(SPEC, ()), rows)
