"""Which rows take the next step together. Pure: no clock, no threads, no engine.

Tickets of one key share a step, whatever their guidance, seed or steps left, and join and leave at every
step. Two rules, and no tuning:

- among keys, the one whose last step lies longest ago goes next, so with K keys busy none waits for more
  than K - 1 steps of others;
- within a key, the oldest tickets go first, so a ticket waits only for the finitely many older ones.

How many rows a step takes is the cost table's choice (``choose_rung``); there is no waiting for more.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

RowT = TypeVar("RowT")


@dataclass(eq=False)
class Ticket(Generic[RowT]):
    """A row's place in the batcher. joined_s: any one monotonic clock; steps_left ≥ 1 while queued.

    key: of the next step; a row that goes on to another graph has it changed before ``Batcher.stepped``.
    """

    row: RowT
    key: Hashable
    steps_left: int
    joined_s: float


@dataclass(frozen=True, eq=False)
class Batch(Generic[RowT]):
    """Tickets to step together. rung: batch size to run, ≥ len(tickets)."""

    key: Hashable
    tickets: tuple[Ticket[RowT], ...]
    rung: int

    @property
    def padding(self) -> int:
        return self.rung - len(self.tickets)


class Batcher(Generic[RowT]):
    """Tickets waiting for their next step.

    choose_rung: (a row of the key, rows waiting ≥ 1) → batch size to run; more than wait means padding.
    """

    def __init__(self, choose_rung: Callable[[RowT, int], int]) -> None:
        self._choose_rung = choose_rung
        self._waiting: dict[Hashable, list[Ticket[RowT]]] = {}
        """By key; the key that stepped longest ago (or never) first."""

    def __len__(self) -> int:
        return sum(len(tickets) for tickets in self._waiting.values())

    def add(self, ticket: Ticket[RowT]) -> None:
        """Raises: ValueError when the ticket has no steps to do."""
        if ticket.steps_left < 1:
            raise ValueError("a ticket needs at least one step")
        tickets = self._waiting.setdefault(ticket.key, [])
        at = len(tickets)
        while at and tickets[at - 1].joined_s > ticket.joined_s:
            at -= 1
        tickets.insert(at, ticket)

    def next(self) -> Batch[RowT] | None:
        """The step to run now, or None when nothing waits. Report it back with ``stepped``."""
        key = next(iter(self._waiting), None)
        if key is None:
            return None
        tickets = self._waiting[key]
        rung = self._choose_rung(tickets[0].row, len(tickets))
        if rung < 1:
            raise ValueError(f"a step needs at least one row, not {rung}")
        return Batch(key, tuple(tickets[:rung]), rung)

    def stepped(self, batch: Batch[RowT]) -> tuple[Ticket[RowT], ...]:
        """Count the step of a batch; its key goes to the back. Returns the tickets that are done."""
        for ticket in batch.tickets:
            ticket.steps_left -= 1
        remaining = [ticket for ticket in self._waiting.pop(batch.key, []) if ticket.steps_left > 0]
        if staying := [ticket for ticket in remaining if ticket.key == batch.key]:
            self._waiting[batch.key] = staying
        for ticket in remaining:
            if ticket.key != batch.key:
                self.add(ticket)
        return tuple(ticket for ticket in batch.tickets if ticket.steps_left == 0)

    def remove(self, leaving: Iterable[Ticket[RowT]]) -> None:
        """Take tickets out between steps: cancelled or failed. Unknown ones are ignored."""
        gone = {id(ticket) for ticket in leaving}
        for key, tickets in list(self._waiting.items()):
            kept = [ticket for ticket in tickets if id(ticket) not in gone]
            if kept:
                self._waiting[key] = kept
            else:
                del self._waiting[key]
