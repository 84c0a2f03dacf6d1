"""A worker: claims jobs it has rows free for, has the engine make them, and commits the results.

The store may be away for a while: nothing is claimed then, results wait to be committed, and leases that ran out
meanwhile are found lost.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass

import structlog

from server.engine import Engine
from server.finishing import Finisher
from server.jobs import HEARTBEAT_S, JobFailedError, Lease, Report
from server.metrics import Metrics
from server.request import MAX_IMAGES
from server.stages import failure_of
from server.storage import ResultStore
from server.stores.base import JobStore
from server.tracing import record_job
from server.work import Crashed, Died, Dropped, Event, Failed, Late, Made, Progress, Started, Stepped

IDLE_CLAIM_S = 1.0
STORE_RETRY_S = 0.5

_log = structlog.get_logger()


@dataclass(eq=False)
class _Held:
    """A lease this worker has. tail: the last of its encoding tasks; the next waits for it."""

    lease: Lease
    tail: asyncio.Task[None] | None = None


class Worker:
    """max_rows: images in the making at once, encoding included.

    files: where results go whose addresses are asked for.
    stuck: True once it ended while an engine call did not return.

    Claims only while a request of any size would fit, so a large one at the head is never overtaken.
    """

    def __init__(
        self,
        name: str,
        engine: Engine,
        store: JobStore,
        metrics: Metrics,
        *,
        max_rows: int = 64,
        encode_threads: int = 2,
        files: ResultStore | None = None,
    ) -> None:
        self.stuck = False
        self._name = name
        self._engine = engine
        self._store = store
        self._metrics = metrics
        self._max_rows = max_rows
        self._rows = 0
        self._held: dict[str, _Held] = {}
        self._freed = asyncio.Event()
        self._draining = False
        self._claiming = False
        self._events: asyncio.Queue[list[Event]] = asyncio.Queue()
        self._finisher = Finisher(engine.offers, encode_threads, files)
        self._models = frozenset(engine.offers)

    @property
    def idle(self) -> bool:
        """It holds no job, and is not about to."""
        return not self._held and not self._claiming

    @property
    def engine_up(self) -> bool:
        return self._engine.up

    async def run(self) -> None:
        """Work until cancelled. Raises: an ExceptionGroup with what ended the engine for good, if anything did."""
        loop = asyncio.get_running_loop()

        def report(events: list[Event]) -> None:
            with suppress(RuntimeError):  # a step that outlived the loop has nobody left to tell
                loop.call_soon_threadsafe(self._events.put_nowait, events)

        self._engine.start(report)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._claim(), name="claim")
                group.create_task(self._settle(group), name="settle")
                group.create_task(self._heartbeats(), name="heartbeat")
        finally:
            self.stuck = not await self._engine.close()
            self._finisher.close()

    def drain(self) -> None:
        """Claim nothing any more; what is held is finished."""
        self._draining = True

    async def give_back_all(self) -> int:
        """Let other workers have what is held; returns how many jobs."""
        leases = [held.lease for held in self._held.values()]
        for lease in leases:
            self._engine.stop_job(lease.token)
        self._held.clear()
        await self._give_back(leases)
        return len(leases)

    async def _give_back(self, leases: Sequence[Lease]) -> None:
        """All at once: a store that is away takes the time of one answer, not of one for each lease."""

        async def give_back(lease: Lease) -> None:
            with suppress(OSError):  # then it runs out
                await self._store.give_back(lease)

        await asyncio.gather(*map(give_back, leases))

    # ---- taking jobs in

    async def _claim(self) -> None:
        while not self._draining:
            await self._engine.ready()
            free = self._max_rows - self._rows
            if free < MAX_IMAGES:
                await self._until_freed()
                continue
            for lease in await self._take(free):
                if lease.alone:
                    await self._run_alone(lease)
                else:
                    self._engine.join_job(lease)

    async def _take(self, rows: int) -> list[Lease]:
        """Leases on what fits; none while the store is away, or when the worker was told to leave meanwhile."""
        self._claiming = True
        try:
            leases = await self._store.claim(self._name, self._models, rows, wait_s=IDLE_CLAIM_S)
            if self._draining:
                await self._give_back(leases)
                return []
            for lease in leases:
                self._held[lease.token] = _Held(lease)
                self._count(lease.job.request.n)
            return leases
        except OSError as error:
            _log.warning("store_away", call="claim", error=str(error))
            await asyncio.sleep(STORE_RETRY_S)
            return []
        finally:
            self._claiming = False

    async def _run_alone(self, lease: Lease) -> None:
        """Let everything else leave the engine first, and nothing join until this job has ended."""
        while len(self._held) > 1:
            await self._until_freed()
        if lease.token in self._held:
            self._engine.join_job(lease)
        while self._held:
            await self._until_freed()

    async def _until_freed(self) -> None:
        self._freed.clear()
        await self._freed.wait()

    # ---- what becomes of them

    async def _heartbeats(self) -> None:
        """Keeps leases alive even while one step takes long, and takes back those of dead workers."""
        while True:
            try:
                await self._store.announce(self._name, self._engine.offers)
                self._stop(await self._store.heartbeat([held.lease for held in self._held.values()]))
                self._metrics.retries.inc(await self._store.reap())
            except OSError as error:
                _log.warning("store_away", call="heartbeat", error=str(error))
            await asyncio.sleep(HEARTBEAT_S)

    async def _settle(self, group: asyncio.TaskGroup) -> None:
        """Handle what the engine reports, in its order; of the plain progress of a job, only the latest."""
        while True:
            events = await self._events.get()
            while not self._events.empty():
                events = [*events, *self._events.get_nowait()]
            steps: dict[str, int] = {}
            for event in events:
                if isinstance(event, Progress) and not event.previews:
                    steps[event.token] = event.step
                else:
                    await self._handle(event, group)
            await self._tell_progress(steps)

    async def _tell_progress(self, steps: dict[str, int]) -> None:
        held = [(self._held[token].lease, step) for token, step in steps.items() if token in self._held]
        if held:
            with suppress(OSError):  # the next heartbeat finds what is to stop
                self._stop(await self._store.progress([Report(lease=lease, step=step) for lease, step in held]))

    async def _handle(self, event: Event, group: asyncio.TaskGroup) -> None:
        if isinstance(event, Crashed):
            await self._fail_all(event.error)
            raise event.error
        if isinstance(event, Died):
            await self._give_back_lost(event)
        elif isinstance(event, Stepped | Dropped):
            self._metrics.engine_did(event)
        elif (held := self._held.get(event.token)) is not None:
            await self._handle_of(held, event, group)

    async def _handle_of(
        self, held: _Held, event: Progress | Made | Failed | Started | Late, group: asyncio.TaskGroup
    ) -> None:
        request, lease = held.lease.job.request, held.lease
        if isinstance(event, Started):
            self._metrics.queue_wait_s.labels(request.model, request.task).observe(event.queue_ms / 1000)
        elif isinstance(event, Late):
            record_job(lease, "expired", event.spans)
            await self._end(held, lambda: self._store.expire(lease))
        elif isinstance(event, Failed):
            failure = event.failure
            self._metrics.poison.labels(request.model, event.stage).inc()
            record_job(lease, "failed", event.spans)
            await self._end(held, lambda: self._store.fail(lease, failure))
        elif isinstance(event, Made):
            self._follow(held, group, self._finish(held, event))
        else:
            self._follow(held, group, self._preview(held, event))

    def _follow(self, held: _Held, group: asyncio.TaskGroup, work: Coroutine[None, None, None]) -> None:
        """Run encoding beside the steps, in order within a job."""
        before = held.tail

        async def run() -> None:
            if before is not None:
                await before
            await work

        held.tail = group.create_task(run())

    async def _preview(self, held: _Held, event: Progress) -> None:
        lease = held.lease
        try:
            previews = await self._finisher.previews(lease.job.request, event)
        except (OSError, ValueError) as error:  # what Pillow raises
            failure = failure_of(error)
            await self._end(held, lambda: self._store.fail(lease, failure))
            self._engine.stop_job(lease.token)
            return
        with suppress(OSError):
            self._stop(await self._store.progress([Report(lease=lease, step=event.step, previews=previews)]))

    async def _finish(self, held: _Held, made: Made) -> None:
        lease, begun = held.lease, time.perf_counter()
        try:
            result = await self._finisher.result(lease, made)
        except (OSError, ValueError, JobFailedError) as error:  # the former two are what Pillow raises
            failure = error.failure if isinstance(error, JobFailedError) else failure_of(error)
            record_job(lease, "failed", made.spans)
            await self._end(held, lambda: self._store.fail(lease, failure))
            return
        record_job(lease, "succeeded", {**made.spans, "encode": (begun, time.perf_counter())})
        await self._end(held, lambda: self._store.finish(lease, result))
        self._metrics.made(lease.job.request.model, result.timing)

    async def _give_back_lost(self, died: Died) -> None:
        """The jobs that were in a dead engine process are tried again, each alone."""
        for token in died.tokens:
            held = self._held.get(token)
            if held is not None:
                lease = held.lease
                record_job(lease, "lost", {})
                await self._end(held, lambda lease=lease: self._store.give_back(lease, crashed=True))  # type: ignore[misc]

    async def _end(self, held: _Held, transition: Callable[[], Awaitable[bool]]) -> None:
        """Commit how a lease ended, however long the store is away, and have its rows free."""
        while held.lease.token in self._held:
            try:
                await transition()
                break
            except OSError as error:
                _log.warning("store_away", call="commit", job=held.lease.job.id, error=str(error))
                await asyncio.sleep(STORE_RETRY_S)
        self._release(held)

    def _stop(self, tokens: frozenset[str]) -> None:
        """Drop the rows of jobs that were cancelled, expired or given to another worker."""
        for token in tokens:
            self._engine.stop_job(token)
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
