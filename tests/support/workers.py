"""A worker on fake engines, and jobs for any worker that has the toy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from engines.pipeline import Pipeline
from server.engine_thread import EngineThread
from server.jobs import Job, JobState
from server.metrics import Metrics
from server.request import DenoiseRequest
from server.stores.memory import MemoryStore
from server.worker import Worker
from tests.support.toy_bundle import DIGITS


def job(name: str, digit: int = 1, **fields: Any) -> Job:
    """digit: its prompt, and its seed unless another is chosen."""
    chosen = {"n": 1, "steps": 4, "seed": digit, **fields}
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
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - what is waited for happens on other threads
            await asyncio.sleep(0.001)


async def run(store: MemoryStore, *jobs: Job) -> list[JobState]:
    for each in jobs:
        await store.submit(each)
    async with asyncio.timeout(30):
        return list(await asyncio.gather(*(store.wait(each.id) for each in jobs)))
