"""An engine thread on fake engines that is spawned, refused and killed as an engine process is."""

from __future__ import annotations

import asyncio
from pathlib import Path

from server.engine import Report
from server.engine_thread import EngineThread
from server.jobs import Lease
from server.work import Died, Event, Failed, Late, Made
from tests.support.fake_engines import Bench


class SpawnedThread(EngineThread):
    """bench: its steps; refusal: raised when it is spawned, if it is; away: once dead, it stays so."""

    def __init__(self, bundle: Path, name: str, refusal: Exception | None = None) -> None:
        self.bench = Bench(bundle, name)
        super().__init__({"toy-digits": self.bench.pipeline})
        self.refusal = refusal
        self.closed = False
        self.away = False
        self._inside: set[str] = set()

    def spawn(self) -> None:
        if self.refusal:
            raise self.refusal

    def start(self, report: Report) -> None:
        def noting(events: list[Event]) -> None:
            self._inside -= {event.token for event in events if isinstance(event, Made | Failed | Late)}
            report(events)

        self._say = report
        super().start(noting)

    @property
    def up(self) -> bool:
        return not self.away

    async def ready(self) -> None:
        if self.away:
            await asyncio.Event().wait()

    def join_job(self, lease: Lease) -> None:
        self._inside.add(lease.token)
        super().join_job(lease)

    def die(self, reason: str = "it was ended by signal 9") -> None:
        """Lose every job, and be up again at once, unless it stays away."""
        lost, self._inside = frozenset(self._inside), set()
        for token in lost:
            self.stop_job(token)
        self._say([Died(lost, reason)])

    async def close(self) -> bool:
        self.closed = True
        self.bench.allow()
        return True if self.refusal else await super().close()
