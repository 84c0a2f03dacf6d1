"""What becomes of the jobs of a worker whose engine, store or leases fail, or that leaves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from structlog.testing import capture_logs

from server.engine_thread import EngineThread
from server.jobs import JobStatus
from server.metrics import Metrics
from server.stores.base import StoreUnavailableError
from server.stores.memory import MemoryStore
from server.worker import Worker
from tests.support.fake_engines import Bench
from tests.support.workers import job, run, until, working

pytestmark = pytest.mark.anyio


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
