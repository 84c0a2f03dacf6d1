"""One worker on a virtual clock: what the engine thread and the worker around it do, without doing it."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from engines.manifest import CONDITION_GRAPH
from server.batching import Batcher, Ticket
from server.capacity.traffic import Call
from server.request import MAX_IMAGES


@dataclass(frozen=True)
class WorkerLimits:
    """max_rows, encode_threads: as of the settings; file_s: seconds one image takes on one of those threads."""

    max_rows: int
    encode_threads: int
    file_s: float


@dataclass(frozen=True)
class Turn:
    """One turn of an engine. rows: of its step, 0 without one; made: requests whose last image it decoded."""

    seconds: float
    rows: int = 0
    made: tuple[Call, ...] = ()


@dataclass(eq=False, slots=True)
class _Image:
    """An image in the making. of: the request; step: what its next step is a call of."""

    of: Call
    step: str


class SimulatedWorker:
    """rows: images it holds, files included, as ``Holdings`` counts them."""

    def __init__(self, limits: WorkerLimits) -> None:
        self.rows = 0
        self._limits = limits
        self._newcomers: list[tuple[Call, float]] = []
        self._batcher: Batcher[_Image] = Batcher(_choose_rung)
        self._threads = [0.0] * limits.encode_threads
        """When each file thread is free; a heap."""

    @property
    def room(self) -> int:
        """Rows it may claim: none while a request of the most images would not fit, as of ``Worker``."""
        free = self._limits.max_rows - self.rows
        return free if free >= MAX_IMAGES else 0

    @property
    def has_work(self) -> bool:
        return bool(self._newcomers) or len(self._batcher) > 0

    def take(self, call: Call, now_s: float) -> None:
        self.rows += call.kind.request.n
        self._newcomers.append((call, now_s))

    def turn(self) -> Turn:
        """Start what came, run one step, decode what it ended: as ``EngineThread`` does."""
        ms = self._start()
        batch = self._batcher.next()
        if batch is None:
            return Turn(ms / 1000)
        first = batch.tickets[0].row
        kind = first.of.kind
        ms += kind.prices.step_ms(first.step, len(batch.tickets))
        for ticket in batch.tickets:
            _advance(ticket)
        done = self._batcher.stepped(batch)
        if done:
            ms += kind.prices.stage_ms(kind.decode, len(done))
        made = []
        for call in (ticket.row.of for ticket in done):
            call.unmade -= 1
            if call.unmade == 0:
                made.append(call)
        return Turn(ms / 1000, len(batch.tickets), tuple(made))

    def write(self, call: Call, now_s: float) -> float:
        """When its files are written, on threads that others wait for, too."""
        end_s = now_s
        for _ in range(call.kind.request.n):
            end_s = max(now_s, self._threads[0]) + self._limits.file_s
            heapq.heapreplace(self._threads, end_s)
        return end_s

    def _start(self) -> float:
        """Milliseconds of conditions and images of the newcomers, whose rows then wait for their first step."""
        newcomers, self._newcomers = self._newcomers, []
        ms = 0.0
        for model in dict.fromkeys(call.kind.request.model for call, _ in newcomers):
            ms += _start_ms([call for call, _ in newcomers if call.kind.request.model == model])
        for call, joined_s in newcomers:
            for _ in range(call.kind.request.n):
                image = _Image(call, call.kind.route[0])
                self._batcher.add(Ticket(image, _key(image), len(call.kind.route), joined_s))
        return ms


def _start_ms(calls: Sequence[Call]) -> float:
    """calls: newcomers of one model."""
    prices = calls[0].kind.prices
    prompts = sum(call.kind.prompts for call in calls if call.new_prompt)
    ms = prices.stage_ms(CONDITION_GRAPH, prompts) if prompts else 0.0
    for encode in dict.fromkeys(call.kind.encode for call in calls):
        kinds = [call.kind for call in calls if call.kind.encode == encode]
        for rows in (sum(kind.request.image is not None for kind in kinds), sum(kind.seen for kind in kinds)):
            ms += prices.stage_ms(encode, rows) if rows else 0.0
    return ms


def _choose_rung(image: _Image, waiting: int) -> int:
    return image.of.kind.prices.best_rung(image.step, waiting)


def _key(image: _Image) -> Hashable:
    """What it shares its next step with."""
    return (image.of.kind.request.model, image.step)


def _advance(ticket: Ticket[_Image]) -> None:
    """Bring an image to the call of the step after the one under way, if there is one."""
    if ticket.steps_left > 1:
        image = ticket.row
        image.step = image.of.kind.route[1 - ticket.steps_left]
        ticket.key = _key(image)
