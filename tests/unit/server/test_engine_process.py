"""A model that crashes, hangs or exits takes down its engine process, and no request but its own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvloop

from server.engine_process import EngineProcess
from server.jobs import JobFailure, JobState, JobStatus, Lease
from server.metrics import Metrics
from server.settings import Settings
from server.stores.memory import MemoryStore
from server.work import Died, Event, Failed, Late, Made
from server.worker import Worker
from tests.support.workers import job

pytestmark = pytest.mark.anyio

FAULTY = (sys.executable, "-m", "tests.support.faulty_engine")


@asynccontextmanager
async def working(engine: EngineProcess, store: MemoryStore, metrics: Metrics | None = None) -> AsyncIterator[None]:
    await asyncio.to_thread(engine.spawn)
    task = asyncio.create_task(Worker("w", engine, store, metrics or Metrics()).run())
    yield
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def ended(store: MemoryStore, *names: str) -> list[JobState]:
    async with asyncio.timeout(120):
        return [await store.wait(name) for name in names]


def files(state: JobState) -> list[bytes | None]:
    assert state.result is not None, state
    return [image.data for image in state.result.images]


@pytest.mark.parametrize(
    ("digit", "code", "deaths"),
    [
        pytest.param(0, "poison", 3, id="device-lost"),
        pytest.param(4, "non_finite", 0, id="nan"),
        pytest.param(5, "poison", 3, id="exit"),
        pytest.param(6, "engine_error", 0, id="exception"),
        pytest.param(7, "poison", 3, id="segfault", marks=pytest.mark.long),
        pytest.param(8, "poison", 3, id="hang"),
        pytest.param(9, "poison", 3, id="out-of-memory"),
    ],
)
async def test_poison_fails_alone(settings: Settings, digit: int, code: str, deaths: int) -> None:
    store, engine, pids = MemoryStore(), EngineProcess(settings, FAULTY), set[int]()
    metrics, names = Metrics(), ["a", "b", "bad", "c"]
    for name, of in zip(names, (1, 2, digit, 3), strict=True):
        await store.submit(job(name, of))
    async with working(engine, store, metrics):
        waiting = asyncio.create_task(ended(store, *names))
        while not waiting.done():
            pids.add(engine.pid)
            await asyncio.sleep(0.01)
        a, b, bad, c = waiting.result()
        await engine.ready()
        for name, of in zip("xyz", (1, 2, 3), strict=True):
            await store.submit(job(name, of))
        again = await ended(store, *"xyz")
    assert bad.failure is not None
    assert bad.failure.code == code
    assert bad.attempt == max(1, deaths)
    assert [files(state) for state in (a, b, c)] == [files(state) for state in again]
    assert len(pids) == deaths + 1
    value, stage = metrics.registry.get_sample_value, "engine" if deaths else "steps"
    assert value("halfstep_engine_deaths_total") == deaths
    assert value("halfstep_poison_jobs_total", {"model": "toy-digits", "stage": stage}) == 1


async def test_a_killed_engine_is_replaced_and_its_jobs_made_again(settings: Settings) -> None:
    store, engine = MemoryStore(), EngineProcess(settings)
    async with working(engine, store):
        await store.submit(job("before", 1, n=10, steps=8))
        os.kill(engine.pid, signal.SIGKILL)
        await store.submit(job("after", 1, n=10, steps=8))
        before, after = await ended(store, "before", "after")
    assert files(before) == files(after)


@pytest.mark.parametrize("hangs", [False, True])
async def test_jobs_of_an_engine_that_does_not_come_back_go_to_other_workers(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    """As soon as it does not start, or when its start is long in coming to an end."""
    if hangs:
        monkeypatch.setattr("server.worker.RESTART_S", 0.2)
    command = "import time; time.sleep(60)" if hangs else "raise SystemExit(1)"
    store, engine, metrics = MemoryStore(), EngineProcess(settings), Metrics()
    metrics.watch_engine(lambda: 0, lambda: engine.up)
    async with working(engine, store, metrics):
        await store.submit(job("first", 1))
        await ended(store, "first")
        engine._command = (sys.executable, "-c", command)
        os.kill(engine.pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            while engine.up:  # noqa: ASYNC110 - another process ends
                await asyncio.sleep(0.01)
        await store.submit(job("second", 1))
        assert metrics.registry.get_sample_value("halfstep_engine_up") == 0
        async with asyncio.timeout(10):
            while (state := await store.get("second")) is None or state.attempt == 0:  # noqa: ASYNC110 - its worker
                await asyncio.sleep(0.001)
        async with asyncio.timeout(20):
            leases = await store.claim("other", ("toy-digits",), 10, wait_s=60)
    assert [(lease.job.id, lease.alone) for lease in leases] == [("second", False)]


async def test_what_was_to_join_an_engine_that_does_not_start_is_reported(settings: Settings) -> None:
    engine, told = EngineProcess(settings, (sys.executable, "-c", "raise SystemExit(1)")), list[Event]()
    engine._report = told.extend
    lease = Lease(job=job("a", 1), worker="w", attempt=1, queued_ms=0.0)
    engine.join_job(lease)
    assert not await engine._spawned()
    (event,) = told
    assert isinstance(event, Died)
    assert (event.tokens, event.untried) == (frozenset(), {lease.token})
    assert engine._waiting == []


async def test_an_engine_that_was_being_restarted_ends_with_its_worker(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, begun, closed = EngineProcess(settings), asyncio.Event(), threading.Event()
    loop, started, popen = asyncio.get_running_loop(), list[subprocess.Popen[bytes]](), subprocess.Popen

    def restart(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        loop.call_soon_threadsafe(begun.set)
        closed.wait(60)
        started.append(popen([sys.executable, "-c", "import time; time.sleep(120)"], **options))
        return started[0]

    async with working(engine, MemoryStore()):
        monkeypatch.setattr("server.engine_process.subprocess.Popen", restart)
        os.kill(engine.pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            await begun.wait()
    closed.set()
    async with asyncio.timeout(60):
        while not started or started[0].returncode is None:  # noqa: ASYNC110 - a thread sets it
            await asyncio.sleep(0.01)
    assert started[0].returncode == -signal.SIGKILL


LEAVES = """
import socket, sys, time
from server.engine_wire import frame

link = socket.socket(fileno=int(sys.argv[1]))
link.recv(1 << 16)
link.sendall(frame({"loaded": {}}))
link.close()
time.sleep(60)
"""


async def test_an_engine_that_speaks_no_more_is_ended(settings: Settings) -> None:
    engine, reports = EngineProcess(settings, (sys.executable, "-c", LEAVES)), asyncio.Queue[list[Event]]()
    await asyncio.to_thread(engine.spawn)
    engine.start(reports.put_nowait)
    (event,) = await asyncio.wait_for(reports.get(), 120)
    assert event == Died(frozenset(), f"it was ended by signal {signal.SIGKILL:d}")
    await engine.close()


async def test_a_supervision_that_fails_ends_the_worker_and_its_job(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> list[Event]:
        raise KeyError("events")

    store, engine = MemoryStore(), EngineProcess(settings)
    monkeypatch.setattr("server.engine_process.events_from", broken)
    await asyncio.to_thread(engine.spawn)
    task = asyncio.create_task(Worker("w", engine, store, Metrics()).run())
    await store.submit(job("a", 1))
    (state,) = await ended(store, "a")
    assert state.status is JobStatus.FAILED
    with pytest.raises(ExceptionGroup) as caught:
        await task
    assert caught.group_contains(KeyError)
    assert not engine.up


async def test_others_get_what_a_worker_without_supervision_held(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, engine = MemoryStore(), EngineProcess(settings)
    monkeypatch.setattr(store, "outlives_process", True)
    monkeypatch.setattr("server.engine_process.events_from", None)
    await store.submit(job("a", 1))
    await asyncio.to_thread(engine.spawn)
    with pytest.raises(ExceptionGroup):
        await Worker("w", engine, store, Metrics()).run()
    (lease,) = await store.claim("another", ["toy-digits"], 10)
    assert (lease.job.id, lease.alone) == ("a", True)


async def test_a_cancelled_job_leaves_the_engine_process(settings: Settings) -> None:
    store, engine = MemoryStore(), EngineProcess(settings, FAULTY)
    async with working(engine, store):
        await store.submit(job("stuck", 8))
        async for event in store.events("stuck"):
            if event.type == "running":
                break
        assert await store.cancel("stuck")
        await store.submit(job("next", 1))
        (state,) = await ended(store, "next")
    assert state.status is JobStatus.SUCCEEDED


def test_jobs_that_come_as_the_process_ends_are_handed_on(settings: Settings) -> None:
    """On uvloop, as served: its transport raises where asyncio's would only warn."""

    async def handed_on() -> list[Event]:
        store, engine, reports = MemoryStore(), EngineProcess(settings, FAULTY), asyncio.Queue[list[Event]]()
        await asyncio.to_thread(engine.spawn)
        engine.start(reports.put_nowait)
        await engine.ready()
        await store.submit(job("a", 1))
        (lease,) = await store.claim("w", ["toy-digits"], 10)
        os.kill(engine.pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            while reports.empty():
                engine.join_job(lease)
                await asyncio.sleep(0)
        events = reports.get_nowait()
        await engine.close()
        return events

    (event,) = uvloop.run(handed_on())
    assert isinstance(event, Died)
    assert len(event.tokens) == 1


def test_a_job_that_is_cancelled_while_no_process_is_up_joins_none(settings: Settings) -> None:
    engine = EngineProcess(settings)
    leases = [Lease(job=job(name, 1), worker="w", attempt=1, queued_ms=0.0) for name in "ab"]
    for lease in leases:
        engine.join_job(lease)
    engine.stop_job(leases[0].token)
    assert engine._waiting == leases[1:]


@pytest.mark.parametrize(
    "end",
    [
        Made("a/1", (), 0.0, 0.0, 0.0, 0.0),
        Failed("a/1", JobFailure(code="c", message="m"), "steps"),
        Late("a/1"),
    ],
    ids=["made", "failed", "late"],
)
def test_a_job_that_ended_is_not_lost_with_the_process_and_the_next_starts_at_once(
    settings: Settings, end: Made | Failed | Late
) -> None:
    engine, told = EngineProcess(settings), list[Event]()
    engine._report, engine._failures = told.extend, 5
    engine._joined = {end.token: Lease(job=job("a", 1), worker="w", attempt=1, queued_ms=0.0)}
    engine._pass_on([end])
    assert (told, engine._joined, engine._failures) == ([end], {}, 0)
