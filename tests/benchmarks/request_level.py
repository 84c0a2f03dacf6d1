"""The server with one thing changed: a batch is made to its end before the next rows join.

Takes the arguments of ``python -m server``; for comparison only.
"""

from __future__ import annotations

from collections.abc import Callable

import server.engine_thread
from server.batching import Batch, Batcher, RowT, Ticket


class WholeRequests(Batcher[RowT]):
    """Batches of rows that started together: nobody joins, rows that are done leave."""

    def __init__(self, choose_rung: Callable[[RowT, int], int]) -> None:
        super().__init__(choose_rung)
        self._together: set[int] = set()

    def next(self) -> Batch[RowT] | None:
        for key, waiting in self._waiting.items():
            tickets = tuple(ticket for ticket in waiting if id(ticket) in self._together)
            if tickets:
                return Batch(key, tickets, max(len(tickets), self._choose_rung(tickets[0].row, len(tickets))))
        batch = super().next()
        if batch is not None:
            self._together = {id(ticket) for ticket in batch.tickets}
        return batch

    def stepped(self, batch: Batch[RowT]) -> tuple[Ticket[RowT], ...]:
        done = super().stepped(batch)
        self._together -= {id(ticket) for ticket in done}
        return done


if __name__ == "__main__":
    server.engine_thread.Batcher = WholeRequests  # type: ignore[misc, assignment]
    from server.cli import app

    app()
