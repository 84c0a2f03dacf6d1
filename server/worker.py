"""A worker: claims jobs it has rows free for, has the engine thread make them, and commits the results."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from engines.pipeline import Pipeline
from server.encoding import encode, encoding_of
from server.engine_thread import EngineThread
from server.jobs import HEARTBEAT_S, EncodedImage, JobResult, Lease, Preview, Report, Timing
from server.metrics import Metrics
from server.request import MAX_IMAGES
from server.stages import failure_of
from server.stores.base import JobStore
from server.work import Crashed, Dropped, Event, Failed, Made, Pixels, Progress, Started, Stepped

IDLE_CLAIM_S = 1.0
CLOSE_S = 2.0


@dataclass(eq=False)
class _Held:
    """A lease this worker has. tail: the last of its encoding tasks; the next waits for it."""

    lease: Lease
    claimed_s: float
    tail: asyncio.Task[None] | None = None


class Worker:
    """pipelines: by model name. max_rows: images in the making at once, encoding included.

    stuck: True once it ended while an engine call had not returned for ``CLOSE_S``.

    Claims only while a request of any size would fit, so a large one at the head is never overtaken.
    """

    def __init__(
        self,
        name: str,
        pipelines: Mapping[str, Pipeline],
        store: JobStore,
        metrics: Metrics,
        *,
        max_rows: int = 64,
        encode_threads: int = 2,
    ) -> None:
        self.stuck = False
        self._name = name
        self._pipelines = pipelines
        self._store = store
        self._metrics = metrics
        self._max_rows = max_rows
        self._rows = 0
        self._held: dict[str, _Held] = {}
        self._freed = asyncio.Event()
        self._events: asyncio.Queue[list[Event]] = asyncio.Queue()
        self._encoders = ThreadPoolExecutor(encode_threads, thread_name_prefix="encode")

    async def run(self) -> None:
        """Work until cancelled. Raises: an ExceptionGroup with what ended the engine thread, if anything did."""
        loop = asyncio.get_running_loop()

        def report(events: list[Event]) -> None:
            with suppress(RuntimeError):  # a step that outlived the loop has nobody left to tell
                loop.call_soon_threadsafe(self._events.put_nowait, events)

        engine = EngineThread(self._pipelines, report)
        engine.start()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._claim(engine), name="claim")
                group.create_task(self._settle(engine, group), name="settle")
                group.create_task(self._heartbeats(engine), name="heartbeat")
        finally:
            self.stuck = not await asyncio.to_thread(engine.close, CLOSE_S)
            self._encoders.shutdown(wait=False)

    async def _claim(self, engine: EngineThread) -> None:
        while True:
            free = self._max_rows - self._rows
            if free < MAX_IMAGES:
                self._freed.clear()
                await self._freed.wait()
                continue
            for lease in await self._store.claim(self._name, self._pipelines.keys(), free, wait_s=IDLE_CLAIM_S):
                self._held[lease.token] = _Held(lease, time.perf_counter())
                self._count(lease.job.request.n)
                if lease.alone:
                    await self._run_alone(engine, lease)
                else:
                    engine.join_job(lease)

    async def _run_alone(self, engine: EngineThread, lease: Lease) -> None:
        """Let everything else leave the engine first, and nothing join until this job has ended."""
        while len(self._held) > 1:
            self._freed.clear()
            await self._freed.wait()
        if lease.token in self._held:
            engine.join_job(lease)
        while self._held:
            self._freed.clear()
            await self._freed.wait()

    async def _heartbeats(self, engine: EngineThread) -> None:
        """Keeps leases alive even while one step takes long, and takes back those of dead workers."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            await self._stop_lost(engine)
            self._metrics.retries.inc(await self._store.reap())

    async def _settle(self, engine: EngineThread, group: asyncio.TaskGroup) -> None:
        """Handle what the engine thread reports, in its order."""
        while True:
            for event in await self._events.get():
                if isinstance(event, Crashed):
                    await self._fail_all(event.error)
                    raise event.error
                if isinstance(event, Stepped | Dropped):
                    self._metrics.engine_did(event)
                    continue
                held = self._held.get(event.token)
                if held is not None:
                    await self._handle(held, event, group)
            await self._stop_lost(engine)

    async def _handle(
        self, held: _Held, event: Progress | Made | Failed | Started, group: asyncio.TaskGroup
    ) -> None:
        request = held.lease.job.request
        if isinstance(event, Started):
            self._metrics.queue_wait_s.labels(request.model, request.task).observe(event.queue_ms / 1000)
        elif isinstance(event, Failed):
            self._metrics.poison.labels(request.model, event.stage).inc()
            await self._store.fail(held.lease, event.failure)
            self._release(held)
        elif isinstance(event, Made):
            self._follow(held, group, self._finish(held, event))
        elif event.previews:
            self._follow(held, group, self._preview(held, event))
        else:
            await self._store.progress([Report(lease=held.lease, step=event.step)])

    def _follow(self, held: _Held, group: asyncio.TaskGroup, work: Coroutine[None, None, None]) -> None:
        """Run encoding beside the steps, in order within a job."""
        before = held.tail

        async def run() -> None:
            if before is not None:
                await before
            await work

        held.tail = group.create_task(run())

    async def _preview(self, held: _Held, event: Progress) -> None:
        request = held.lease.job.request
        try:
            files = [await self._encode(held, pixels, request.seed + image) for image, _, pixels in event.previews]
        except (OSError, ValueError) as error:  # what Pillow raises
            await self._store.fail(held.lease, failure_of(error))
            return  # the lease is lost now, so its rows leave with ``_stop_lost``
        previews = tuple(
            Preview(image=image, index=index, data=data)
            for (image, index, _), data in zip(event.previews, files, strict=True)
        )
        await self._store.progress([Report(lease=held.lease, step=event.step, previews=previews)])

    async def _finish(self, held: _Held, made: Made) -> None:
        request = held.lease.job.request
        begun = time.perf_counter()
        try:
            pairs = zip(made.pixels, request.seeds, strict=True)
            files = await asyncio.gather(*(self._encode(held, pixels, seed) for pixels, seed in pairs))
        except (OSError, ValueError) as error:  # what Pillow raises
            await self._store.fail(held.lease, failure_of(error))
            self._release(held)
            return
        timing = Timing(
            queue=made.queue_ms,
            condition=made.condition_ms,
            steps=made.steps_ms,
            decode=made.decode_ms,
            encode=(time.perf_counter() - begun) * 1000,
        )
        images = tuple(
            EncodedImage(seed=seed, data=data, format=request.output_format)
            for seed, data in zip(request.seeds, files, strict=True)
        )
        engine = self._pipelines[request.model].engine_name
        await self._store.finish(held.lease, JobResult(engine=engine, timing=timing, images=images))
        self._metrics.made(request.model, timing)
        self._release(held)

    async def _encode(self, held: _Held, pixels: Pixels, seed: int) -> bytes:
        request = held.lease.job.request
        encoding = encoding_of(request, seed, self._pipelines[request.model].engine_name)
        return await asyncio.get_running_loop().run_in_executor(self._encoders, encode, pixels, encoding)

    async def _stop_lost(self, engine: EngineThread) -> None:
        """Drop the rows of jobs that were cancelled or given to another worker."""
        if not self._held:
            return
        leases = [held.lease for held in self._held.values()]
        for token in await self._store.heartbeat(leases):
            engine.stop_job(token)
            held = self._held.get(token)
            if held is not None:
                self._release(held)

    async def _fail_all(self, error: Exception) -> None:
        failure = failure_of(error)
        for held in list(self._held.values()):
            await self._store.fail(held.lease, failure)
            self._release(held)

    def _release(self, held: _Held) -> None:
        if self._held.pop(held.lease.token, None) is not None:
            self._count(-held.lease.job.request.n)
            self._freed.set()

    def _count(self, rows: int) -> None:
        self._rows += rows
        self._metrics.rows.set(self._rows)
