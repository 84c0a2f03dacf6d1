"""The engine in use, and those that only finish what they have started: changing engines drops no row.

New jobs go to the engine in use. One that was replaced keeps its jobs until they are done, and is closed then. An
engine that is doubted takes no jobs until it is trusted again or replaced; one that is given up hands all it has to
its successor, where they start anew. Any engine can be asked for images that no job waits for.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from engines.errors import BackendError
from server.costs import Offer
from server.engine import Engine, Report
from server.jobs import Job, Lease
from server.parity import Sample, sample_of
from server.request import DenoiseRequest
from server.work import Crashed, Died, Dropped, Event, Failed, Late, Made, Pixels, Stepped

ENGINE_FAULTS = frozenset({"engine_error", "non_finite"})
"""Failures of a job for which its engine may be to blame."""

ASK_S = 900.0
"""Most time an engine has to answer a question."""

TRUST_S = 60.0
"""How long an engine that was cleared of doubt is not doubted again: jobs that break by themselves come in rows."""

RECENT = 4

Doubt = Callable[[str], None]
"""Told that the engine in use failed, and how; whoever hears it has it trusted or replaced."""


@dataclass(eq=False)
class _Question:
    """Images asked of an engine, by token."""

    engine: Engine
    missing: set[str]
    answers: asyncio.Future[dict[str, Pixels]]
    found: dict[str, Pixels] = field(default_factory=dict)


class EngineSwitch:
    """An ``Engine`` made of the one in use and its predecessors. first: not yet started.

    To be used in the event loop it was started in.
    """

    def __init__(self, first: Engine) -> None:
        self._current = first
        self._jobs: dict[Engine, dict[str, Lease]] = {first: {}}
        """Unfinished jobs of the engine in use and of its predecessors."""
        self._questions: list[_Question] = []
        self._numbers = count()
        self._on_doubt: Doubt | None = None
        self._doubted = False
        self._trusted_until_s = 0.0
        self._waiting: list[Lease] = []
        self._faults: dict[str, Failed] = {}
        """What is not told before it is clear whose fault it was; their jobs are still their engine's."""
        self.recent: deque[Sample] = deque(maxlen=RECENT)
        """What the engine in use made last: one image of a job."""
        self._changed = asyncio.Event()
        self._closing: set[asyncio.Task[bool]] = set()

    # ---- as an engine

    @property
    def offers(self) -> Mapping[str, Offer]:
        return self._current.offers

    @property
    def pid(self) -> int:
        return self._current.pid

    @property
    def up(self) -> bool:
        return self._current.up and not self._doubted

    def start(self, report: Report) -> None:
        self._report = report
        self._loop = asyncio.get_running_loop()
        self.listen_to(self._current)

    async def ready(self) -> None:
        while not self.up:
            waits: list[asyncio.Future[Any]] = [asyncio.ensure_future(self._changed.wait())]
            if not self._doubted:
                waits.append(asyncio.ensure_future(self._current.ready()))
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()

    def join_job(self, lease: Lease) -> None:
        if self._doubted:
            self._waiting.append(lease)
        else:
            self._jobs[self._current][lease.token] = lease
            self._current.join_job(lease)

    def stop_job(self, token: str) -> None:
        self._waiting = [lease for lease in self._waiting if lease.token != token]
        self._faults.pop(token, None)
        for engine, jobs in list(self._jobs.items()):
            if jobs.pop(token, None) is not None:
                engine.stop_job(token)
                self._retire_idle(engine)

    async def close(self) -> bool:
        engines = {*self._jobs, *(question.engine for question in self._questions)}
        closed = await asyncio.gather(*(engine.close() for engine in engines), *self._closing)
        return all(closed)

    # ---- changing engines

    def listen_to(self, engine: Engine) -> None:
        """Start an engine: as the one in use, or to ask it before it is taken up."""

        def report(events: list[Event]) -> None:
            with suppress(RuntimeError):  # a step that outlived the loop has nobody left to tell
                self._loop.call_soon_threadsafe(self._hear, engine, events)

        engine.start(report)

    def take_up(self, successor: Engine, on_doubt: Doubt | None, *, give_up: bool = False) -> None:
        """Send new jobs to an engine that was listened to.

        give_up: hand it the unfinished ones as well, as of an engine that is doubted or down; on_doubt: called when
        the successor fails; without one its failures are told as they are.
        """
        give_up |= not self.up
        former, self._current = self._current, successor
        self._jobs[successor] = {}
        handed = list(self._jobs[former].values()) if give_up else []
        if give_up:
            self._jobs[former] = {}
            self._faults = {}
        self._on_doubt, self._trusted_until_s = on_doubt, 0.0
        self.recent.clear()
        self._end_doubt(handed)
        self._retire_idle(former)

    def trust(self) -> None:
        """Go on with the doubted engine: what failed in it failed by itself."""
        for token in self._faults:
            self._jobs[self._current].pop(token, None)
        self._trusted_until_s = self._loop.time() + TRUST_S
        told: list[Event] = list(self._faults.values())
        self._faults = {}
        self._end_doubt([])
        if told:
            self._report(told)

    def hand_back(self, reason: str) -> None:
        """Let other workers have the jobs that wait for a successor of the doubted engine."""
        waiting, self._waiting = [lease.token for lease in self._waiting], []
        untried = frozenset([*waiting, *self._jobs[self._current]])
        self._jobs[self._current], self._faults = {}, {}
        self._report([Died(frozenset(), reason, untried)])

    async def ask(self, engine: Engine, requests: Sequence[DenoiseRequest]) -> list[Pixels]:
        """The images of requests of one image each, from an engine that is listened to.

        Raises: BackendError when it fails on one, ends, or does not answer in time.
        """
        leases = [self._question_lease(request) for request in requests]
        tokens = [lease.token for lease in leases]
        question = _Question(engine, set(tokens), self._loop.create_future())
        self._questions.append(question)
        joining = asyncio.ensure_future(self._join_when_ready(question, leases))
        try:
            async with asyncio.timeout(ASK_S):
                answers = await question.answers
            return [answers[token] for token in tokens]
        except TimeoutError:
            raise BackendError(f"the engine gave no answer within {ASK_S:g} s") from None
        finally:
            joining.cancel()
            self._questions.remove(question)
            for token in question.missing:
                engine.stop_job(token)

    def uses(self, engine: Engine) -> bool:
        """Whether it is the engine in use, or finishes what it started as one."""
        return engine in self._jobs

    def discard(self, engine: Engine) -> None:
        """Close an engine that is not in use, whatever it is doing."""
        task = asyncio.ensure_future(engine.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    # ---- what engines say

    def _hear(self, engine: Engine, events: list[Event]) -> None:
        told = [event for event in events if self._heard(engine, event)]
        if told:
            self._report(told)
        self._retire_idle(engine)

    def _heard(self, engine: Engine, event: Event) -> bool:
        """Note an event; whether the worker is to be told."""
        if isinstance(event, Crashed | Died):
            return self._heard_end(engine, event)
        if isinstance(event, Stepped | Dropped):
            return engine in self._jobs
        if self._answered(engine, event) or event.token not in self._jobs.get(engine, {}):
            return False
        if isinstance(event, Failed) and event.failure.code in ENGINE_FAULTS and self._doubts(engine):
            self._faults[event.token] = event
            self._doubt(event.failure.code)
            return False
        if isinstance(event, Made | Failed | Late):
            lease = self._jobs[engine].pop(event.token)
            if isinstance(event, Made) and engine is self._current:
                self.recent.append(sample_of(lease.job.request, event.pixels[0]))
        return True

    def _heard_end(self, engine: Engine, event: Crashed | Died) -> bool:
        reason = event.reason if isinstance(event, Died) else str(event.error)
        for question in self._questions:
            if question.engine is engine and not question.answers.done():
                question.answers.set_exception(BackendError(reason))
        jobs = self._jobs.get(engine)
        if jobs is None:
            return False
        if engine is self._current:
            if isinstance(event, Died):
                for token in event.tokens | event.untried:
                    jobs.pop(token, None)
                if self._doubts(engine):
                    self._doubt(reason)
            return True
        lost = event.tokens if isinstance(event, Died) else frozenset(jobs)
        handed = [lease for token, lease in jobs.items() if token not in lost]
        self._jobs[engine] = {}
        self._join_all(handed)
        self._report([Died(lost, reason)])
        return False

    def _answered(self, engine: Engine, event: Event) -> bool:
        """Whether the event is about a question, which then notes it."""
        token = getattr(event, "token", None)
        question = next((q for q in self._questions if q.engine is engine and token in q.missing), None)
        if question is None or token is None:
            return False
        if isinstance(event, Made):
            question.missing.discard(token)
            question.found[token] = event.pixels[0]
            if not question.missing and not question.answers.done():
                question.answers.set_result(question.found)
        elif isinstance(event, Failed) and not question.answers.done():
            question.answers.set_exception(BackendError(f"it fails with {event.failure.code}"))
        return True

    # ---- doubt, and the end of it

    def _doubts(self, engine: Engine) -> bool:
        trusted = not self._doubted and self._loop.time() < self._trusted_until_s
        return engine is self._current and self._on_doubt is not None and not trusted

    def _doubt(self, reason: str) -> None:
        if not self._doubted and self._on_doubt is not None:
            self._doubted = True
            self._on_doubt(reason)

    def _end_doubt(self, leases: Iterable[Lease]) -> None:
        self._doubted = False
        waiting, self._waiting = self._waiting, []
        self._join_all([*leases, *waiting])
        self._changed.set()
        self._changed = asyncio.Event()

    def _join_all(self, leases: Iterable[Lease]) -> None:
        for lease in leases:
            self.join_job(lease)

    def _retire_idle(self, engine: Engine) -> None:
        if engine is not self._current and engine in self._jobs and not self._jobs[engine]:
            del self._jobs[engine]
            self.discard(engine)

    async def _join_when_ready(self, question: _Question, leases: Sequence[Lease]) -> None:
        await question.engine.ready()
        for lease in leases:
            question.engine.join_job(lease)

    def _question_lease(self, request: DenoiseRequest) -> Lease:
        job = Job(id=f"question-{next(self._numbers)}", request=request, cost_s=0.0)
        return Lease(job=job, worker="", attempt=0, queued_ms=0.0)
