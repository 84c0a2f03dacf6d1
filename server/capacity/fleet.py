"""Workers behind one queue and the server's admission, on a virtual clock."""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import count

from server.admission import Admission
from server.capacity.traffic import Call
from server.capacity.worker import SimulatedWorker, Turn, WorkerLimits
from server.errors import OverloadedError
from server.jobs import Backlog


@dataclass
class Outcome:
    """latencies: seconds of every call from its arrival to its files, infinite where it was refused."""

    latencies: list[float] = field(default_factory=list)
    busy_s: float = 0.0
    span_s: float = 0.0
    steps: int = 0
    rows: int = 0


class Fleet:
    """Calls wait in the order in which they came; one goes to any worker that has room, whichever asks first.

    Nothing takes time but the engines and the writing of files. seed: of who asks first.
    """

    def __init__(self, workers: int, limits: WorkerLimits, admission: Admission, seed: int) -> None:
        self._workers = [SimulatedWorker(limits) for _ in range(workers)]
        self._admission = admission
        self._dice = random.Random(seed)  # noqa: S311 - a model of chance, no secret
        self._roomy = list(self._workers)
        self._busy: set[SimulatedWorker] = set()
        self._queue: deque[Call] = deque()
        self._backlog = Backlog(jobs=0, rows=0, seconds=0.0)
        self._now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._outcome = Outcome()

    def run(self, calls: Iterable[Call]) -> Outcome:
        """calls: in the order of their times; each is used up."""
        for call in calls:
            self._until(call.at_s)
            self._arrive(call)
        self._until(math.inf)
        self._outcome.span_s = self._now_s
        return self._outcome

    def _until(self, time_s: float) -> None:
        while self._events and self._events[0][0] <= time_s:
            self._now_s, _, happen = heapq.heappop(self._events)
            happen()
        self._now_s = time_s if math.isfinite(time_s) else self._now_s

    def _at(self, time_s: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), happen))

    def _arrive(self, call: Call) -> None:
        try:
            self._admission.check(self._backlog, call.kind.request, workers=len(self._workers))
        except OverloadedError:
            self._outcome.latencies.append(math.inf)
            return
        self._count(call, 1)
        self._queue.append(call)
        while self._queue and self._roomy:
            self._claim(self._dice.choice(self._roomy))

    def _count(self, call: Call, jobs: int) -> None:
        """Take a call into the backlog, or with -1 out of it."""
        held = self._backlog
        self._backlog = Backlog(
            jobs=held.jobs + jobs,
            rows=held.rows + jobs * call.kind.request.n,
            seconds=held.seconds + jobs * self._admission.cost_s(call.kind.request),
        )

    def _claim(self, worker: SimulatedWorker) -> None:
        """All that fits, as the job store gives it."""
        room = worker.room
        while self._queue and self._queue[0].kind.request.n <= room:
            call = self._queue.popleft()
            room -= call.kind.request.n
            worker.take(call, self._now_s)
        if worker.room == 0:
            self._roomy.remove(worker)
        if worker not in self._busy and worker.has_work:
            self._busy.add(worker)
            self._turn(worker)

    def _turn(self, worker: SimulatedWorker) -> None:
        turn = worker.turn()
        self._outcome.busy_s += turn.seconds
        self._outcome.steps += turn.rows > 0
        self._outcome.rows += turn.rows
        self._at(self._now_s + turn.seconds, partial(self._turned, worker, turn))

    def _turned(self, worker: SimulatedWorker, turn: Turn) -> None:
        for call in turn.made:
            self._at(worker.write(call, self._now_s), partial(self._answered, worker, call))
        if worker.has_work:
            self._turn(worker)
        else:
            self._busy.remove(worker)

    def _answered(self, worker: SimulatedWorker, call: Call) -> None:
        self._outcome.latencies.append(self._now_s - call.at_s)
        self._count(call, -1)
        had_room = worker.room > 0
        worker.rows -= call.kind.request.n
        if not had_room and worker.room:
            self._roomy.append(worker)
            self._claim(worker)
