"""A worker on fake engines that changes them under way, as a test has it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.bundle import verify_bundle
from engines.errors import BackendError
from server.jobs import Job, JobState
from server.metrics import Metrics
from server.request import DenoiseRequest
from server.settings import Settings
from server.stores.memory import MemoryStore
from server.succession import Succession
from server.versions import Version
from server.worker import Worker
from tests.support.spawned import SpawnedThread
from tests.support.workers import until

FIRST, BUILT, LATER = "first 1 float32", "built 1 float32", "later 1 float32"


@dataclass
class Stage:
    """A worker whose next engines a test prepares. built: lets the build end; makes: the next engines, in order."""

    succession: Succession
    first: SpawnedThread
    store: MemoryStore
    metrics: Metrics
    makes: list[SpawnedThread]
    built: asyncio.Event = field(default_factory=asyncio.Event)
    build_error: str = ""
    loaded: list[Mapping[str, str]] = field(default_factory=list)

    async def make(self, name: str, digit: str = "one", **fields: Any) -> JobState:
        await self.submit(name, digit, **fields)
        return await self.ended(name)

    async def submit(self, name: str, digit: str = "one", **fields: Any) -> None:
        chosen = {"n": 1, "steps": 4, "seed": 1, **fields}
        request = DenoiseRequest(
            model="toy-digits", prompt=digit, guidance_scale=2.0, width=64, height=64, **chosen
        )
        await self.store.submit(Job(id=name, request=request, cost_s=0.0))

    async def ended(self, name: str) -> JobState:
        async with asyncio.timeout(60):
            return await self.store.wait(name)

    def changes(self, what: str, outcome: str) -> float:
        return self.value("halfstep_takeovers_total", what=what, outcome=outcome)

    def value(self, metric: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(metric, labels) or 0.0

    async def until_change(self, what: str, outcome: str) -> None:
        await until(lambda: self.changes(what, outcome) > 0)

    async def at_work(self, built: SpawnedThread) -> None:
        """Take up the built engine, and hold it in the steps of the jobs a, b and c."""
        self.built.set()
        await self.until_change("engine", "taken_up")
        built.bench.hold()
        for name in "abc":
            await self.submit(name, "one", steps=8)
        await until(lambda: built.bench.batches[-1][0] == "step_8")


@asynccontextmanager
async def stage(
    bundle: Path, *makes: SpawnedThread, start: bool = True, lease_s: float = 30.0
) -> AsyncIterator[Stage]:
    """A worker on its first engine, with those to come. start: the first one is not the preferred."""
    backends: dict[str, Any] = {"backend": "openvino", "start_backend": "onnxruntime"} if start else {}
    settings = Settings(bundles=(bundle,), **backends)

    def make(_: Settings, versions: Mapping[str, str]) -> SpawnedThread:
        made.loaded.append(versions)
        return made.makes.pop(0)

    async def build(_: Settings) -> None:
        await made.built.wait()
        if made.build_error:
            raise BackendError(made.build_error)

    first, metrics, store = SpawnedThread(bundle, FIRST), Metrics(), MemoryStore(lease_s)
    version = Version.of(verify_bundle(bundle))
    succession = Succession(first, settings, [version], metrics, make, build)
    made = Stage(succession, first, store, metrics, list(makes))
    task = asyncio.create_task(Worker("w", succession, store, metrics, lease_s=lease_s).run())
    yield made
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert first.closed


def engine_of(state: JobState) -> str:
    assert state.result is not None, state.failure
    return state.result.engine


def code_of(state: JobState) -> str:
    assert state.failure is not None
    return state.failure.code
