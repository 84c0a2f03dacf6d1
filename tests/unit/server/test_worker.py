"""A worker on fake engines: joining, leaving, isolation, cancellation, backpressure, and previews."""

from __future__ import annotations

import asyncio
import io
import struct
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines.pipeline import Pipeline
from server.encoding import encode
from server.engine_thread import EngineThread
from server.jobs import JobStatus
from server.metrics import Metrics
from server.request import MAX_IMAGES
from server.stores.memory import MemoryStore
from tests.support.fake_engines import Bench
from tests.support.toy_bundle import DIGITS
from tests.support.workers import job, run, until, working

pytestmark = pytest.mark.anyio


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
