"""A worker on fake engines: joining, leaving, isolation, cancellation, backpressure, and its own death."""

from __future__ import annotations

import asyncio
import io
import struct
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from structlog.testing import capture_logs

from engines.pipeline import Pipeline
from server.encoding import encode
from server.engine_thread import EngineThread
from server.jobs import Job, JobState, JobStatus
from server.metrics import Metrics
from server.request import MAX_IMAGES, DenoiseRequest
from server.stores.base import StoreUnavailableError
from server.stores.memory import MemoryStore
from server.worker import Worker
from tests.support.fake_engines import Bench

pytestmark = pytest.mark.anyio

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture
def bench(toy_bundle: Path) -> Bench:
    return Bench(toy_bundle)


def job(name: str, digit: int = 1, **fields: Any) -> Job:
    chosen = {"n": 1, "steps": 4, "seed": 1, **fields}
    request = DenoiseRequest(
        model="toy-digits", prompt=DIGITS[digit], guidance_scale=2.0, width=64, height=64, **chosen
    )
    return Job(id=name, request=request, cost_s=0.0)


@asynccontextmanager
async def working(
    pipeline: Pipeline, store: MemoryStore, metrics: Metrics | None = None, **options: Any
) -> AsyncIterator[asyncio.Task[None]]:
    worker = Worker("w", EngineThread({"toy-digits": pipeline}), store, metrics or Metrics(), **options)
    task = asyncio.create_task(worker.run())
    yield task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - what is waited for happens on the engine thread
            await asyncio.sleep(0.001)


async def run(store: MemoryStore, *jobs: Job) -> list[JobState]:
    for each in jobs:
        await store.submit(each)
    async with asyncio.timeout(30):
        return list(await asyncio.gather(*(store.wait(each.id) for each in jobs)))


async def test_a_job_is_made(bench: Bench) -> None:
    store = MemoryStore()
    async with working(bench.pipeline, store):
        (state,) = await run(store, job("a", n=3, seed=7))
    assert state.status is JobStatus.SUCCEEDED
    assert state.result is not None
    assert [image.seed for image in state.result.images] == [7, 8, 9]
    assert state.result.engine == "fake 1 float32"
    assert all(image.data.startswith(b"\x89PNG") for image in state.result.images)


async def test_an_engine_that_was_closed_holds_no_models(bench: Bench) -> None:
    class Models(dict[str, Pipeline]):
        """That a weak reference can be had of."""

    models = Models({"toy-digits": bench.pipeline})
    held, engine = weakref.ref(models), EngineThread(models)
    engine.start(lambda _: None)
    del models
    assert held() is not None
    assert await engine.close()
    assert held() is None


async def test_rows_join_at_the_next_step_and_leave_when_done(bench: Bench) -> None:
    store = MemoryStore()
    bench.hold()
    async with working(bench.pipeline, store):
        await store.submit(job("a", digit=1))
        await until(lambda: len(bench.batches) == 1)
        await store.submit(job("b", digit=2))
        await asyncio.sleep(0)
        await until(lambda: len(store.jobs.queue) == 0)
        bench.allow()
        await store.wait("a")
        await store.wait("b")
    assert [classes for _, classes in bench.batches] == [[1], [1, 2], [1, 2], [1, 2], [2]]


async def test_an_exception_fails_its_own_request_only(bench: Bench) -> None:
    store = MemoryStore()
    async with working(bench.pipeline, store):
        (alone,) = await run(store, job("alone", digit=3, seed=5))
        bench.poison = 6
        bench.hold()
        for each in (job("good", digit=3, seed=5), job("bad", digit=6), job("fine", digit=4)):
            await store.submit(each)
        await until(lambda: len(store.jobs.queue) == 0)
        bench.allow()
        good, bad, fine = [await store.wait(name) for name in ("good", "bad", "fine")]
    assert (good.status, fine.status) == (JobStatus.SUCCEEDED, JobStatus.SUCCEEDED)
    assert bad.failure is not None
    assert bad.failure.code == "engine_error"
    assert good.result is not None
    assert alone.result is not None
    assert good.result.images == alone.result.images


async def test_a_cancelled_job_leaves_after_the_step_under_way(bench: Bench) -> None:
    store, metrics = MemoryStore(), Metrics()
    bench.hold()
    async with working(bench.pipeline, store, metrics=metrics):
        await store.submit(job("a", digit=1, steps=8))
        await store.submit(job("b", digit=2, steps=8))
        await until(lambda: bench.batches != [] and len(store.jobs.queue) == 0)
        await store.cancel("a")
        bench.allow(1)
        await until(lambda: metrics.registry.get_sample_value("halfstep_rows_in_flight") == 1)
        bench.allow()
        companion = await store.wait("b")
    assert companion.status is JobStatus.SUCCEEDED
    assert sum(classes.count(1) for _, classes in bench.batches) <= 2
    cancelled = metrics.registry.get_sample_value("halfstep_cancelled_steps_total", {"model": "toy-digits"})
    assert cancelled is not None
    assert cancelled >= 6


async def test_only_what_fits_is_claimed(bench: Bench) -> None:
    store = MemoryStore()
    bench.hold()
    async with working(bench.pipeline, store, max_rows=20):
        for name in "abc":
            await store.submit(job(name, n=10))
        await until(lambda: bench.batches != [])
        assert [len(store.jobs.queue), (await store.backlog()).rows] == [1, 30]
        bench.allow()
        states = [await store.wait(name) for name in "abc"]
    assert {state.status for state in states} == {JobStatus.SUCCEEDED}


async def test_previews_arrive_in_order(bench: Bench) -> None:
    store = MemoryStore()
    async with working(bench.pipeline, store):
        await store.submit(job("a", n=2, steps=8, partial_images=3))
        previews = [event.preview async for event in store.events("a") if event.preview is not None]
    assert [(p.index, p.image) for p in previews] == [(k, image) for k in range(3) for image in range(2)]
    assert len({p.data for p in previews}) == 6


async def test_a_preview_is_the_clean_estimate_of_its_step_and_says_its_images_seed(bench: Bench) -> None:
    store, pipeline = MemoryStore(), bench.pipeline
    async with working(pipeline, store):
        await store.submit(job("a", n=2, seed=5, partial_images=1))
        previews = [event.preview async for event in store.events("a") if event.preview is not None]
    (condition,) = pipeline.condition([DIGITS[1]])
    for preview in previews:
        row = pipeline.start(condition, 2.0, 5 + preview.image, pipeline.student(4))
        for _ in range(2):
            pipeline.step([row])
        shown = Image.open(io.BytesIO(preview.data))
        np.testing.assert_array_equal(np.asarray(shown), pipeline.decode([row.clean])[0])
        assert not np.array_equal(row.clean, row.latent)
        assert f"Seed: {5 + preview.image}," in shown.info["parameters"]


async def test_a_dead_engine_thread_fails_what_it_held_and_says_so(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    monkeypatch.setattr("server.engine_thread.best_rung", None)
    async with working(bench.pipeline, store) as task:
        (state,) = await run(store, job("a"))
        assert state.status is JobStatus.FAILED
        with pytest.raises(ExceptionGroup):
            await task


@pytest.mark.parametrize("previews", [0, 1])
@pytest.mark.parametrize("fault", [OSError("encoder error -2"), struct.error("int too large to convert")], ids=repr)
async def test_what_cannot_be_encoded_fails_its_own_request(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, fault: Exception, previews: int
) -> None:
    def broken(pixels: Any, encoding: Any) -> bytes:
        raise fault

    store, metrics = MemoryStore(), Metrics()
    async with working(bench.pipeline, store, metrics=metrics) as task:
        with monkeypatch.context() as patch:
            patch.setattr("server.finishing.encode", broken)
            (bad,) = await run(store, job("bad", steps=8, partial_images=previews))
        assert bad.failure is not None
        assert bad.failure.code == "engine_error"
        (good,) = await run(store, job("good"))
        assert good.status is JobStatus.SUCCEEDED
        await until(lambda: metrics.registry.get_sample_value("halfstep_rows_in_flight") == 0)
        assert not task.done()


async def test_a_job_past_its_deadline_runs_no_step(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """And ends as the engine finds it late, not when the reaper comes by."""
    monkeypatch.setattr("server.worker.HEARTBEAT_S", 3600.0)
    store = MemoryStore()
    bench.hold()
    async with working(bench.pipeline, store):
        await store.submit(job("companion", digit=1))
        await until(lambda: bench.batches != [])
        late = job("late", digit=2).model_copy(update={"deadline_ms": 200})
        await store.submit(late)
        ends = time.monotonic() + 0.25
        await until(lambda: time.monotonic() > ends)
        bench.allow()
        async with asyncio.timeout(30):
            states = [await store.wait(name) for name in ("companion", "late")]
    assert [state.status for state in states] == [JobStatus.SUCCEEDED, JobStatus.EXPIRED]
    assert {digit for _, classes in bench.batches for digit in classes} == {1}


async def test_a_leaving_worker_gives_back_what_it_cannot_finish(bench: Bench) -> None:
    store = MemoryStore()
    bench.hold()
    worker = Worker("leaving", EngineThread({"toy-digits": bench.pipeline}), store, Metrics())
    task = asyncio.create_task(worker.run())
    await store.submit(job("a"))
    await until(lambda: bench.batches != [])
    worker.drain()
    await store.submit(job("b"))
    assert not worker.idle
    assert await worker.give_back_all() == 1
    await until(lambda: worker.idle)
    bench.allow()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    leases = await store.claim("w", ["toy-digits"], 10)
    assert [(lease.job.id, lease.alone) for lease in leases] == [("a", False), ("b", False)]


class _AwayStore(MemoryStore):
    """Cannot be reached while ``away``."""

    away = False

    async def claim(self, *args: Any, **kwargs: Any) -> Any:
        self._reach()
        return await super().claim(*args, **kwargs)

    async def finish(self, *args: Any) -> bool:
        self._reach()
        return await super().finish(*args)

    def _reach(self) -> None:
        if self.away:
            raise StoreUnavailableError("away")


async def test_a_result_waits_for_the_store_to_come_back(bench: Bench) -> None:
    store = _AwayStore()
    bench.hold()
    async with working(bench.pipeline, store) as task:
        await store.submit(job("a"))
        await until(lambda: bench.batches != [])
        store.away = True
        bench.allow()
        await until(lambda: len(bench.batches) == 4)
        assert (await store.get("a")).status is JobStatus.RUNNING  # type: ignore[union-attr]
        store.away = False
        assert (await store.wait("a")).status is JobStatus.SUCCEEDED
        (after,) = await run(store, job("b"))
        assert after.status is JobStatus.SUCCEEDED
        assert not task.done()


async def test_an_outage_is_logged_once_however_often_it_is_met(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    async def away(*_: Any, **__: Any) -> Any:
        tries.append(1)
        raise StoreUnavailableError("refused")

    monkeypatch.setattr("server.worker.STORE_RETRY_S", 0.01)
    monkeypatch.setattr("server.worker.HEARTBEAT_S", 0.01)
    store = MemoryStore()
    with capture_logs() as logs:
        async with working(bench.pipeline, store):
            with monkeypatch.context() as outage:
                for call in ("claim", "heartbeat", "reap"):
                    outage.setattr(store, call, away)
                await until(lambda: len(tries) > 9)
            await until(lambda: any(line["event"] == "store_back" for line in logs))
    assert [line["event"] for line in logs] == ["store_away", "store_back"]


async def test_a_store_that_hears_nothing_but_the_end_costs_no_job(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: Any, **__: Any) -> Any:
        raise StoreUnavailableError("away")

    store = MemoryStore()
    for call in ("until_ended", "progress", "give_back"):
        monkeypatch.setattr(store, call, away)
    worker = Worker("w", EngineThread({"toy-digits": bench.pipeline}), store, Metrics())
    task = asyncio.create_task(worker.run())
    (state,) = await run(store, job("a", steps=8, partial_images=2))
    assert state.status is JobStatus.SUCCEEDED
    bench.hold()
    await store.submit(job("b"))
    await until(lambda: len(bench.batches) == 9)
    assert await worker.give_back_all() == 1
    bench.allow()
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


class _CountingStore(MemoryStore):
    """Full: it takes in nothing new. Away at the heartbeats of these numbers. calls: those that succeeded."""

    def __init__(self, away: range) -> None:
        super().__init__()
        self.calls: list[str] = []
        self._beats, self._away = 0, away

    async def heartbeat(self, leases: Any) -> frozenset[str]:
        self._beats += 1
        if self._beats in self._away:
            self.calls.clear()
            raise StoreUnavailableError("away")
        self.calls.append("heartbeat")
        return await super().heartbeat(leases)

    async def reap(self) -> int:
        self.calls.append("reap")
        return await super().reap()

    async def announce(self, *_: Any) -> None:
        raise StoreUnavailableError("full")


@pytest.mark.parametrize("away", [range(0), range(4, 7)], ids=["from the start", "after an outage"])
@pytest.mark.parametrize(("lease_s", "beats"), [(0.16, 8), (0.1, 5), (0.01, 2)])
async def test_leases_are_renewed_for_a_quarter_of_one_before_silent_ones_are_taken_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, away: range, lease_s: float, beats: int
) -> None:
    monkeypatch.setattr("server.worker.HEARTBEAT_S", 0.005)
    store = _CountingStore(away)
    async with working(bench.pipeline, store, lease_s=lease_s):
        await until(lambda: store._beats > max(away, default=0) and "reap" in store.calls)
    assert store.calls[: beats + 2] == ["heartbeat"] * (beats + 1) + ["reap"]


async def test_a_job_that_is_to_run_alone_has_the_engine_for_itself(bench: Bench) -> None:
    """It waits for those before it, and those behind it wait for it."""
    store = MemoryStore()
    bench.hold()
    async with working(bench.pipeline, store):
        await store.submit(job("before", digit=1))
        await until(lambda: len(bench.batches) == 1)
        await store.submit(job("suspect", digit=2))
        (lost,) = store.jobs.take("dead", ["toy-digits"], 10)
        await store.give_back(lost, crashed=True)
        await store.submit(job("behind", digit=3))
        await until(lambda: store.jobs.records["suspect"].attempt == 2)
        bench.allow(4)
        await until(lambda: len(bench.batches) == 5)
        bench.allow()
        states = [await store.wait(name) for name in ("before", "suspect", "behind")]
    assert {state.status for state in states} == {JobStatus.SUCCEEDED}
    assert [classes for _, classes in bench.batches] == [[1]] * 4 + [[2]] * 4 + [[3]] * 4


async def test_progress_is_that_of_the_slowest_image(bench: Bench) -> None:
    store = MemoryStore()
    async with working(bench.pipeline, store):
        await run(store, job("a", n=10))  # two more than step together
        steps = [event.step async for event in store.events("a") if event.type == "step"]
    assert 4 not in steps


async def test_previews_are_told_in_order_though_the_first_takes_longest(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, first, free = MemoryStore(), threading.Semaphore(), threading.Event()

    def slow(pixels: Any, encoding: Any) -> bytes:
        if first.acquire(blocking=False):
            free.wait(60)
        return encode(pixels, encoding)

    monkeypatch.setattr("server.finishing.encode", slow)
    async with working(bench.pipeline, store):
        await store.submit(job("a", steps=8, partial_images=3))
        await until(lambda: len(bench.batches) == 8)
        await asyncio.sleep(0.05)
        free.set()
        previews = [event.preview async for event in store.events("a") if event.preview is not None]
    assert [preview.index for preview in previews] == [0, 1, 2]


async def test_a_job_whose_preview_fails_leaves_after_the_step_under_way(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(pixels: Any, encoding: Any) -> bytes:
        raise OSError("encoder error -2")

    store, metrics = MemoryStore(), Metrics()
    bench.hold()
    async with working(bench.pipeline, store, metrics=metrics):
        with monkeypatch.context() as patch:
            patch.setattr("server.finishing.encode", broken)
            await store.submit(job("bad", digit=2, steps=8, partial_images=1))
            await until(lambda: len(bench.batches) == 1)
            bench.allow(4)
            await until(lambda: metrics.registry.get_sample_value("halfstep_rows_in_flight") == 0)
        await until(lambda: len(bench.batches) == 5)
        bench.allow()
        await run(store, job("good", digit=1))
    assert [classes for _, classes in bench.batches] == [[2]] * 5 + [[1]] * 4


async def test_an_engine_that_is_down_is_no_capacity(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    store, beats = MemoryStore(), list[int]()

    async def heartbeat(leases: Any) -> frozenset[str]:
        beats.append(len(leases))
        return frozenset()

    monkeypatch.setattr("server.worker.HEARTBEAT_S", 0.001)
    monkeypatch.setattr(store, "heartbeat", heartbeat)
    monkeypatch.setattr(EngineThread, "up", False)
    async with working(bench.pipeline, store):
        await until(lambda: len(beats) > 2)
        assert await store.offers() == {}
        monkeypatch.setattr(EngineThread, "up", True)
        beats.clear()
        await until(lambda: len(beats) > 1)
        assert set(await store.offers()) == {"w"}


async def test_a_job_that_others_end_leaves_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a heartbeat or a step to report, which would tell."""
    monkeypatch.setattr("server.worker.HEARTBEAT_S", 3600.0)
    store, metrics = MemoryStore(), Metrics()
    bench.hold()
    async with working(bench.pipeline, store, metrics=metrics):
        await store.submit(job("a"))
        await until(lambda: len(bench.batches) == 1)
        await store.cancel("a")
        await until(lambda: metrics.registry.get_sample_value("halfstep_rows_in_flight") == 0)
        assert len(bench.batches) == 1
        bench.allow()


async def test_as_many_rows_as_the_largest_request_has_are_room_for_it(bench: Bench) -> None:
    store = MemoryStore()
    async with working(bench.pipeline, store, max_rows=MAX_IMAGES):
        (state,) = await run(store, job("a", n=MAX_IMAGES))
    assert state.status is JobStatus.SUCCEEDED
