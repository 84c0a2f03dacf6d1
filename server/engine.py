"""What runs the jobs of a worker: a thread of its process, or a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from server.costs import Offer
from server.jobs import Lease
from server.work import Event

Report = Callable[[list[Event]], None]


class Engine(Protocol):
    """Joins and leaves are heard between two steps; what comes of them is reported as events."""

    @property
    def offers(self) -> Mapping[str, Offer]:
        """The models it has ready."""
        ...

    def start(self, report: Report) -> None:
        """Begin, in the running event loop. report: called, on any thread, with the events of one step."""
        ...

    @property
    def up(self) -> bool:
        """Jobs are taken; they are not while the engine is started again."""
        ...

    @property
    def pid(self) -> int:
        """The process it runs in."""
        ...

    async def ready(self) -> None:
        """Wait until it is up."""
        ...

    def join_job(self, lease: Lease) -> None:
        """Take a job in at the next step."""
        ...

    def stop_job(self, token: str) -> None:
        """Drop a lease's rows at the next step; no event follows."""
        ...

    async def close(self) -> bool:
        """End after the step under way; unfinished jobs are dropped. False: that step did not return."""
        ...
