"""Whether there is room for one more request, in predicted seconds of engine time."""

from __future__ import annotations

import math

from server.catalogue import Catalogue
from server.errors import OverloadedError
from server.jobs import Backlog
from server.request import DenoiseRequest


class Admission:
    """max_queue_s, max_queued_rows: accepted, unfinished work beyond which requests are refused."""

    def __init__(self, catalogue: Catalogue, max_queue_s: float, max_queued_rows: int) -> None:
        self._catalogue = catalogue
        self._max_queue_s = max_queue_s
        self._max_queued_rows = max_queued_rows

    def cost_s(self, request: DenoiseRequest) -> float:
        """Predicted engine seconds of a request at the best batch size."""
        return self._catalogue.find(request.model).predict_s(request)

    def check(
        self, backlog: Backlog, request: DenoiseRequest, deadline_ms: int | None = None, workers: int = 1
    ) -> None:
        """workers: that share the work.

        Raises: OverloadedError, with the time until there is room again, as predicted from measured costs.
        """
        cost_s = self.cost_s(request)
        waiting_s = backlog.seconds + cost_s
        late_s = backlog.seconds / max(workers, 1) + cost_s - (deadline_ms or math.inf) / 1000
        if late_s > 0 and backlog.jobs:
            message = "The deadline cannot be met: more work is waiting than fits before it."
            raise OverloadedError("deadline_unmeetable", message, retry_after_s=late_s)
        rows = backlog.rows + request.n
        if backlog.jobs == 0 or (waiting_s <= self._max_queue_s and rows <= self._max_queued_rows):
            return
        per_row_s = backlog.seconds / max(backlog.rows, 1)
        excess_s = max(waiting_s - self._max_queue_s, (rows - self._max_queued_rows) * per_row_s)
        message = "The server has as much work as it accepts; the Retry-After header says when to try again."
        raise OverloadedError("queue_full", message, retry_after_s=max(excess_s, 0.001))
