"""Requests given up at random steps, by DELETE or by leaving: what each still cost, and whether it hurt another."""

from __future__ import annotations

import asyncio
import base64
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
from rich.console import Console
from rich.table import Table

from server.jobs import IdempotencyKey, Job, Submission
from server.stores.base import JobStore
from server.stores.memory import MemoryStore
from server.stores.redis.store import RedisStore
from tests.chaos.counting_engine import CountingEngine
from tests.support.live import Live, live
from tests.support.redis_server import RedisServer

STEPS = 8
AT_ONCE = 32
LOOK_S = 0.004
QUIET_S = 60.0
DIGITS = ("one", "two", "three", "four", "five", "six")
COMPANIONS = tuple((digit, seed) for digit in DIGITS for seed in (1, 2))
FIRST_SEED = 1000
"""Of the requests that are given up; each has one of its own, by which its job is known."""


Reached = Callable[[int], str | None]


@dataclass(frozen=True)
class Storm:
    """cancels: that come in time; step_s: least time of a step.

    redis: over a Redis, else over the memory store, in lockstep.

    Over Redis the further steps are told, not judged: they are the time its message takes, in steps.
    """

    cancels: int
    step_s: float
    redis: bool
    seed: int = 1


@dataclass
class Aftermath:
    """further: how many steps were begun after the one under way when a request was given up → requests."""

    storm: Storm
    seconds: float = 0.0
    further: Counter[int] = field(default_factory=Counter)
    companions: int = 0
    faults: list[str] = field(default_factory=list)


class _Watch:
    """Notes, at the store, which job a request became and the turn in which it was given up."""

    def __init__(self, store: JobStore, engine: CountingEngine) -> None:
        self.jobs: dict[int, str] = {}
        self.given_up: dict[str, int] = {}
        submit, cancel = store.submit, store.cancel

        async def submit_noted(job: Job, key: IdempotencyKey | None = None) -> Submission:
            self.jobs[job.request.seed] = job.id
            return await submit(job, key)

        async def cancel_noted(job_id: str) -> bool:
            done = await cancel(job_id)
            if done:
                self.given_up[job_id] = engine.turn
            return done

        store.submit, store.cancel = submit_noted, cancel_noted  # type: ignore[method-assign]


def run(storm: Storm, bundle: Path) -> Aftermath:
    """Run it and judge."""
    if not storm.redis:
        return _run(storm, bundle, MemoryStore())
    with RedisServer("", "always") as server:
        aftermath = _run(storm, bundle, RedisStore(server.url, answer_s=30))
        kinds = ("lane", "queue", "returned", "backlog")
        left = [key for kind in kinds for key in server.client.keys(f"halfstep:{kind}:*")]
        left += [key for key in (b"halfstep:taken", b"halfstep:tenants") if server.client.exists(key)]
        aftermath.faults += [f"left in the store: {key.decode()}" for key in left]
        return aftermath


def tell(aftermaths: list[Aftermath]) -> int:
    """The verdict on cancels; exit status."""
    columns = (
        "store",
        "given up",
        "seconds",
        "no further step",
        "one",
        "more",
        "companions, all as alone",
        "faults",
    )
    table = Table(*columns)
    for aftermath in aftermaths:
        counts = aftermath.further
        more = counts.total() - counts[0] - counts[1]
        figures = (counts.total(), round(aftermath.seconds), counts[0], counts[1], more, aftermath.companions)
        store = "Redis" if aftermath.storm.redis else "memory"
        table.add_row(store, *map(str, figures), "; ".join(aftermath.faults) or "none")
    Console(width=160).print(table)
    return 1 if any(aftermath.faults for aftermath in aftermaths) else 0


def _run(storm: Storm, bundle: Path, store: JobStore) -> Aftermath:
    engines: list[CountingEngine] = []

    def make(*args: object) -> CountingEngine:
        engines.append(CountingEngine(*args, step_s=storm.step_s, lockstep=not storm.redis))  # type: ignore[arg-type]
        return engines[0]

    with live(bundle, store=store, make_engine=make, max_queue_s=1e6) as running:
        aftermath = Aftermath(storm)
        watch = _Watch(store, engines[0])
        began = time.monotonic()
        asyncio.run(_drive(storm, running, engines[0], watch, aftermath))
        aftermath.seconds = time.monotonic() - began
        for job_id, turn in watch.given_up.items():
            aftermath.further[sum(step > turn for step in engines[0].steps[job_id])] += 1
        late = sum(count for further, count in aftermath.further.items() if further > 1)
        if late and not storm.redis:
            aftermath.faults.append(f"{late} ran more than one further step: {dict(aftermath.further)}")
        return aftermath


async def _drive(storm: Storm, running: Live, engine: CountingEngine, watch: _Watch, aftermath: Aftermath) -> None:
    rng = random.Random(storm.seed)
    async with AsyncExitStack() as stack:
        limits = httpx.Limits(max_connections=None)
        client = await stack.enter_async_context(
            httpx.AsyncClient(base_url=running.url, timeout=120, limits=limits)
        )
        alone = {request: await _draw(client, *request) for request in COMPANIONS}
        over, numbers = asyncio.Event(), itertools.count()

        async def accompany(request: tuple[str, int]) -> None:
            while not over.is_set():
                if await _draw(client, *request) != alone[request]:
                    aftermath.faults.append(f"a companion changed its bytes: {request}")
                aftermath.companions += 1

        async def keep_giving_up() -> None:
            while len(watch.given_up) < storm.cancels:
                k = next(numbers)
                victim = _delete if k % 2 else _leave
                await victim(client, FIRST_SEED + k, partial(_reached, engine, watch, rng.randrange(STEPS)))

        beside = [asyncio.create_task(accompany(request)) for request in COMPANIONS]
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(keep_giving_up())
        over.set()
        await asyncio.gather(*beside)
        await _quiet(client, running, aftermath)


async def _draw(client: httpx.AsyncClient, prompt: str, seed: int) -> bytes:
    body = {"prompt": prompt, "seed": seed, "steps": STEPS}
    answer = await client.post("/v1/images/generations", json=body)
    answer.raise_for_status()
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


async def _delete(client: httpx.AsyncClient, seed: int, reached: Reached) -> None:
    body = {"prompt": "seven", "seed": seed, "steps": STEPS}
    accepting = asyncio.create_task(client.post("/v1/jobs", json=body))
    while (job_id := reached(seed)) is None:  # noqa: ASYNC110 - the engine's thread counts
        await asyncio.sleep(LOOK_S)
    cancelled = await client.delete(f"/v1/jobs/{job_id}")
    assert cancelled.status_code in (200, 409), cancelled.text  # 409: it was made before
    (await accepting).raise_for_status()


async def _leave(client: httpx.AsyncClient, seed: int, reached: Reached) -> None:
    body = {"prompt": "eight", "seed": seed, "steps": STEPS}
    waiting = asyncio.create_task(client.post("/v1/images/generations", json=body))
    while reached(seed) is None and not waiting.done():  # noqa: ASYNC110 - the engine's thread counts
        await asyncio.sleep(LOOK_S)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


def _reached(engine: CountingEngine, watch: _Watch, step: int, seed: int) -> str | None:
    """The request's job, once it was accepted and so many of its steps have begun."""
    job_id = watch.jobs.get(seed)
    return job_id if job_id is not None and len(engine.steps[job_id]) >= step else None


async def _quiet(client: httpx.AsyncClient, running: Live, aftermath: Aftermath) -> None:
    """Wait for the end of everything, and see that nothing is left."""
    until_s = time.monotonic() + QUIET_S
    gauges = ("halfstep_rows_in_flight", "halfstep_queued_seconds")
    while time.monotonic() < until_s:
        await client.get("/metrics")
        left = {name: running.count(name) for name in gauges}
        if not any(left.values()):
            return
        await asyncio.sleep(0.05)
    aftermath.faults.append(f"left: {left}")
