"""An engine thread that writes down which job each of its steps was for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress

from engines.pipeline import Pipeline
from server.batching import Batch
from server.engine import Report
from server.engine_thread import EngineThread
from server.work import Event, Image

HOPS = 5
"""Rounds of the event loop after which it has surely handled a report, with a store that never waits."""

PATIENCE_S = 60


class CountingEngine(EngineThread):
    """turn: from the report of one step to that of the next; steps: by job, the turn of each step of its rows.

    step_s: least time of a step. lockstep: never more than one report ahead of the event loop, so that what a test
    counts does not hang on how quick the machine is.
    """

    def __init__(self, pipelines: Mapping[str, Pipeline], step_s: float, *, lockstep: bool) -> None:
        super().__init__(pipelines)
        self.turn = 0
        self.steps: defaultdict[str, list[int]] = defaultdict(list)
        self._step_s = step_s
        self._lockstep = lockstep
        self._reported = self._handled = 0
        self._told = threading.Condition()

    def start(self, report: Report) -> None:
        loop = asyncio.get_running_loop()

        def handled(hops: int) -> None:
            if hops:
                loop.call_soon(handled, hops - 1)
                return
            with self._told:
                self._handled += 1
                self._told.notify_all()

        def report_and_note(events: list[Event]) -> None:
            self.turn += 1
            report(events)
            self._reported += 1
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(handled, HOPS)

        super().start(report_and_note)

    def _receive(self) -> bool:
        if self._lockstep:
            with self._told:
                self._told.wait_for(lambda: self._handled >= self._reported - 1, PATIENCE_S)
        return super()._receive()

    def _step(self, batch: Batch[Image]) -> None:
        for job_id in {ticket.row.work.lease.job.id for ticket in batch.tickets}:
            self.steps[job_id].append(self.turn)
        time.sleep(self._step_s)
        super()._step(batch)
