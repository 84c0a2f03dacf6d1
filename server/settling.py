"""What becomes of the jobs a worker holds: the engine's events, turned into commits to the store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Coroutine
from contextlib import suppress
from functools import partial

from server.engine import Engine
from server.finishing import Finisher
from server.holdings import Held, Holdings
from server.jobs import JobStatus, Lease, Report
from server.metrics import Metrics
from server.outage import Outage
from server.stages import failure_of
from server.stores.base import JobStore
from server.tracing import record_job
from server.work import Crashed, Died, Dropped, Event, Failed, Late, Made, Progress, Started, Stepped

STORE_RETRY_S = 0.5


class Settling:
    """Handles what the engine reports, in its order. A result waits for a store that is away."""

    def __init__(
        self,
        engine: Engine,
        store: JobStore,
        metrics: Metrics,
        holdings: Holdings,
        finisher: Finisher,
        outage: Outage,
    ) -> None:
        self._engine = engine
        self._store = store
        self._metrics = metrics
        self._holdings = holdings
        self._finisher = finisher
        self._outage = outage
        self._events: asyncio.Queue[list[Event]] = asyncio.Queue()

    def hear(self, events: list[Event]) -> None:
        """Take in the events of one step. In the event loop."""
        self._events.put_nowait(events)

    async def run(self, group: asyncio.TaskGroup) -> None:
        """Of the plain progress of a job, only the latest counts. group: for encoding, beside the steps.

        Raises: what ended the engine for good.
        """
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

    def stop(self, tokens: Collection[str]) -> None:
        """Drop the rows of jobs that were cancelled, expired or given to another worker."""
        for token in tokens:
            self._engine.stop_job(token)
            held = self._holdings.get(token)
            if held is not None:
                self._holdings.release(held)

    async def give_back_all(self, *, crashed: bool = False) -> int:
        """Let other workers have what is held; returns how many jobs. crashed: as of ``JobStore.give_back``."""
        leases = self._holdings.leases
        self.stop([lease.token for lease in leases])
        await self.give_back(leases, crashed=crashed)
        return len(leases)

    async def hand_on(self, leases: Collection[Lease]) -> None:
        """Let other workers have jobs that no engine here has begun."""
        self.stop([lease.token for lease in leases])
        await self.give_back(leases)

    async def give_back(self, leases: Collection[Lease], *, crashed: bool = False) -> None:
        """All at once: a store that is away takes the time of one answer, not of one for each lease."""

        async def give_back(lease: Lease) -> None:
            with suppress(OSError):  # then it runs out
                await self._store.give_back(lease, crashed=crashed)

        await asyncio.gather(*map(give_back, leases))

    async def give_up(self, error: Exception) -> None:
        """Of a worker that has failed for good: others finish what it held, or, where there are none, it fails."""
        if self._store.outlives_process:
            await self.give_back_all(crashed=True)
            return
        failure = failure_of(error)
        for held in self._holdings:
            await self._store.fail(held.lease, failure)
            self._holdings.release(held)

    def close(self) -> None:
        self._finisher.close()

    async def _tell_progress(self, steps: dict[str, int]) -> None:
        held = {token: self._holdings.get(token) for token in steps}
        reports = [Report(lease=found.lease, step=steps[token]) for token, found in held.items() if found]
        if reports:
            with suppress(OSError):  # the next heartbeat finds what is to stop
                self.stop(await self._store.progress(reports))

    async def _handle(self, event: Event, group: asyncio.TaskGroup) -> None:
        if isinstance(event, Crashed):
            raise event.error
        if isinstance(event, Died):
            await self._give_back_lost(event)
        elif isinstance(event, Stepped | Dropped):
            self._metrics.engine_did(event)
        elif (held := self._holdings.get(event.token)) is not None:
            await self._handle_of(held, event, group)

    async def _handle_of(
        self, held: Held, event: Progress | Made | Failed | Started | Late, group: asyncio.TaskGroup
    ) -> None:
        request, lease = held.lease.job.request, held.lease
        if isinstance(event, Started):
            held.engine = event.engine
            self._metrics.queue_wait_s.labels(request.model, request.task).observe(event.queue_ms / 1000)
        elif isinstance(event, Late):
            record_job(lease, "expired", event.spans)
            await self._end(held, partial(self._store.expire, lease))
        elif isinstance(event, Failed):
            self._metrics.poison.labels(request.model, event.stage).inc()
            record_job(lease, "failed", event.spans)
            await self._end(held, partial(self._store.fail, lease, event.failure))
        elif isinstance(event, Made):
            self._follow(held, group, self._finish(held, event))
        else:
            self._follow(held, group, self._preview(held, event))

    def _follow(self, held: Held, group: asyncio.TaskGroup, work: Coroutine[None, None, None]) -> None:
        """Run encoding beside the steps, in order within a job."""
        before = held.tail

        async def run() -> None:
            if before is not None:
                await before
            await work

        held.tail = group.create_task(run())

    async def _preview(self, held: Held, event: Progress) -> None:
        lease = held.lease
        try:
            previews = await self._finisher.previews(lease.job.request, event, held.engine)
        except Exception as error:  # whatever Pillow raises: one bad job is no end of the worker
            await self._end(held, partial(self._store.fail, lease, failure_of(error)))
            self._engine.stop_job(lease.token)
            return
        with suppress(OSError):
            self.stop(await self._store.progress([Report(lease=lease, step=event.step, previews=previews)]))

    async def _finish(self, held: Held, made: Made) -> None:
        lease, begun = held.lease, time.perf_counter()
        try:
            result = await self._finisher.result(lease, made, held.engine)
        except Exception as error:  # whatever Pillow raises: one bad job is no end of the worker
            failure = failure_of(error)
            record_job(lease, "failed", made.spans)
            await self._end(held, partial(self._store.fail, lease, failure))
            return
        record_job(lease, "succeeded", {**made.spans, "encode": (begun, time.perf_counter())})
        await self._end(held, partial(self._store.finish, lease, result))
        self._metrics.made(lease.job.request.model, result.timing)

    async def _give_back_lost(self, died: Died) -> None:
        """The jobs that were in a dead engine process are tried again, each alone; the others as they were."""
        self._metrics.engine_deaths.inc()
        await self.hand_on([held.lease for held in filter(None, map(self._holdings.get, died.untried))])
        for held in filter(None, map(self._holdings.get, died.tokens)):
            record_job(held.lease, "lost", {})
            await self._end(held, partial(self._give_back_crashed, held.lease))

    async def _give_back_crashed(self, lease: Lease) -> None:
        if await self._store.give_back(lease, crashed=True) is JobStatus.FAILED:
            self._metrics.poison.labels(lease.job.request.model, "engine").inc()

    async def _end(self, held: Held, transition: Callable[[], Awaitable[object]]) -> None:
        """Commit how a lease ended, however long the store is away, and have its rows free."""
        while held.lease.token in self._holdings:
            try:
                await transition()
                break
            except OSError as error:
                self._outage.goes_on(str(error), call="commit")
                await asyncio.sleep(STORE_RETRY_S)
        self._holdings.release(held)
