"""A worker: claims jobs it has rows free for, has the engine make them, and commits the results.

The store may be away for a while: nothing is claimed then, results wait to be committed, and leases that ran out
meanwhile are found lost.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from server.engine import Engine
from server.finishing import Finisher
from server.holdings import Holdings
from server.jobs import HEARTBEAT_S, Lease
from server.metrics import Metrics
from server.outage import Outage
from server.request import MAX_IMAGES
from server.safety import Safety
from server.settling import STORE_RETRY_S, Settling
from server.storage import ResultStore
from server.stores.base import JobStore
from server.work import Event

IDLE_CLAIM_S = 1.0

RESTART_S = 30.0
"""Most time that jobs wait for an engine that is started again; where it does not start, they leave at once."""

RENEWAL_SHARE = 0.25
"""Of a lease: how long the store answers before silent leases are taken back. Other workers may find it again some
seconds later, when what they were waiting for has timed out and names are looked up anew."""


class Worker:
    """max_rows: images in the making at once, encoding included; lease_s: see Settings.

    files: where results go whose addresses are asked for; safety: what may withhold finished images.
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
        lease_s: float = 30.0,
        encode_threads: int = 2,
        files: ResultStore | None = None,
        safety: Safety | None = None,
    ) -> None:
        self.stuck = False
        self._name = name
        self._engine = engine
        self._store = store
        self._metrics = metrics
        self._max_rows = max_rows
        self._renewal_beats = max(2, round(RENEWAL_SHARE * lease_s / HEARTBEAT_S))
        self._holdings = Holdings(metrics)
        finisher = Finisher(encode_threads, files, safety)
        self._outage = Outage()
        self._settling = Settling(engine, store, metrics, self._holdings, finisher, self._outage)
        self._draining = False
        self._claiming = False

    @property
    def idle(self) -> bool:
        """It holds no job, and is not about to."""
        return not self._holdings and not self._claiming

    @property
    def engine_up(self) -> bool:
        return self._engine.up

    async def run(self) -> None:
        """Work until cancelled. Raises: an ExceptionGroup with what ended it or its engine for good."""
        loop = asyncio.get_running_loop()

        def report(events: list[Event]) -> None:
            with suppress(RuntimeError):  # a step that outlived the loop has nobody left to tell
                loop.call_soon_threadsafe(self._settling.hear, events)

        self._engine.start(report)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._claim(group), name="claim")
                group.create_task(self._settling.run(group), name="settle")
                group.create_task(self._heartbeats(), name="heartbeat")
        except ExceptionGroup as failed:
            await self._settling.give_up(failed)
            raise
        finally:
            self.stuck = not await self._engine.close()
            self._settling.close()

    def drain(self) -> None:
        """Claim nothing any more; what is held is finished."""
        self._draining = True

    async def give_back_all(self) -> int:
        """Let other workers have what is held; returns how many jobs."""
        return await self._settling.give_back_all()

    async def _claim(self, group: asyncio.TaskGroup) -> None:
        while not self._draining:
            await self._engine.ready()
            free = self._max_rows - self._holdings.rows
            if free < MAX_IMAGES:
                await self._holdings.until_freed()
                continue
            for lease in await self._take(free, group):
                if lease.alone:
                    await self._run_alone(lease)
                else:
                    self._engine.join_job(lease)

    async def _take(self, rows: int, group: asyncio.TaskGroup) -> list[Lease]:
        """Leases on what fits; none while the store is away, or when the worker was told to leave meanwhile."""
        self._claiming = True
        try:
            leases = await self._store.claim(self._name, frozenset(self._engine.offers), rows, wait_s=IDLE_CLAIM_S)
            self._outage.is_over()
            if self._draining:
                await self._settling.give_back(leases)
                return []
            for lease in leases:
                self._holdings.take(lease, group.create_task(self._watch(lease)))
            if leases and not self._engine.up:
                group.create_task(self._unless_back(leases))
            return leases
        except OSError as error:
            self._outage.goes_on(str(error), call="claim")
            await asyncio.sleep(STORE_RETRY_S)
            return []
        finally:
            self._claiming = False

    async def _unless_back(self, leases: list[Lease]) -> None:
        """Let others have jobs that were claimed as the engine went down, when it is long in coming back."""
        try:
            async with asyncio.timeout(RESTART_S):
                await self._engine.ready()
        except TimeoutError:
            await self._settling.hand_on([lease for lease in leases if lease.token in self._holdings])

    async def _watch(self, lease: Lease) -> None:
        """Hear at once of a job that others end: its rows leave after the step under way, or the next."""
        with suppress(OSError):  # then the job's next report finds out
            await self._store.until_ended(lease.job.id)
            self._settling.stop([lease.token])

    async def _run_alone(self, lease: Lease) -> None:
        """Let everything else leave the engine first, and nothing join until this job has ended."""
        while len(self._holdings) > 1:
            await self._holdings.until_freed()
        if lease.token in self._holdings:
            self._engine.join_job(lease)
        while self._holdings:
            await self._holdings.until_freed()

    async def _heartbeats(self) -> None:
        """Keeps leases alive even while one step takes long, and takes back those of dead workers.

        Not right after an outage of the store: leases that ran out meanwhile are first for their workers to renew.
        """
        beats = 0
        while True:
            try:
                leases = self._holdings.leases
                self._settling.stop(await self._store.heartbeat(leases))
                if leases:  # without any the store was not asked
                    self._outage.is_over()
                beats += 1
                if beats > self._renewal_beats:
                    self._metrics.retries.inc(await self._store.reap())
            except OSError as error:
                beats = 0
                self._outage.goes_on(str(error), call="heartbeat")
            else:
                if self._engine.up:  # what is down is no capacity
                    with suppress(OSError):  # which a full store refuses
                        await self._store.announce(self._name, self._engine.offers)
            await asyncio.sleep(HEARTBEAT_S)
