"""Whether there is room for one more request, in predicted seconds of engine time."""

from __future__ import annotations

import math

from server.catalogue import Catalogue
from server.errors import OverloadedError, RateError
from server.jobs import Backlog
from server.request import DenoiseRequest


class Admission:
    """Accepted, unfinished work beyond which requests are refused.

    max_queue_s: for each worker; max_queued_rows: of all that the same workers do; tenant_share: of both, what one
    tenant may fill.
    """

    def __init__(
        self, catalogue: Catalogue, max_queue_s: float, max_queued_rows: int, tenant_share: float = 1.0
    ) -> None:
        self._catalogue = catalogue
        self._max_queue_s = max_queue_s
        self._max_queued_rows = max_queued_rows
        self._tenant_share = tenant_share

    def cost_s(self, request: DenoiseRequest) -> float:
        """Predicted engine seconds of a request at the best batch size."""
        return self._catalogue.find(request.model).predict_s(request)

    def check(
        self, backlog: Backlog, request: DenoiseRequest, deadline_ms: int | None = None, workers: int = 1
    ) -> None:
        """backlog: what the workers that have the model ready are to do; workers: how many those are.

        A model that no worker has ready has what one worker may be given, and no other model waits for it.
        Raises: OverloadedError, with the time until there is room again, as predicted from measured costs.
        """
        workers = max(workers, 1)
        late_s = backlog.seconds / workers + self.cost_s(request) - (deadline_ms or math.inf) / 1000
        if late_s > 0 and backlog.jobs:
            message = "The deadline cannot be met: more work is waiting than fits before it."
            raise OverloadedError("deadline_unmeetable", message, retry_after_s=late_s)
        excess_s = self._excess_s(backlog, request, 1.0, workers)
        if excess_s > 0:
            message = "The server has as much work as it accepts; the Retry-After header says when to try again."
            raise OverloadedError("queue_full", message, retry_after_s=excess_s)

    def check_share(self, own: Backlog, request: DenoiseRequest, workers: int = 1) -> None:
        """own: the accepted, unfinished work of the tenant that asks; workers: that share the work.

        Raises: RateError, with the time until it has room again when its work alone is done.
        """
        excess_s = self._excess_s(own, request, self._tenant_share, max(workers, 1))
        if excess_s > 0:
            message = "This tenant's share of the queue is full; the Retry-After header says when to try again."
            raise RateError("tenant_queue_full", message, retry_after_s=excess_s)

    def _excess_s(self, backlog: Backlog, request: DenoiseRequest, share: float, workers: int) -> float:
        """Predicted seconds until there is room; 0 when there is, as there always is beside nothing."""
        max_s, max_rows = share * workers * self._max_queue_s, share * self._max_queued_rows
        waiting_s, rows = backlog.seconds + self.cost_s(request), backlog.rows + request.n
        if backlog.jobs == 0 or (waiting_s <= max_s and rows <= max_rows):
            return 0.0
        per_row_s = backlog.seconds / max(backlog.rows, 1)
        return max((waiting_s - max_s) / workers, (rows - max_rows) * per_row_s / workers, 0.001)
