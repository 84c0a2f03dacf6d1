"""An outage of a store in the log: why it began, each new reason once, and its end."""

from __future__ import annotations

import logging
import time
from typing import Any

import structlog

ANEW_S = 60.0
"""A call that was begun so long after the last failure, and fails, is waited for anew: nobody tried meanwhile."""

_log = structlog.get_logger()


class Outage:
    """Of one process, whatever of it finds the store away: a line for each call that fails would bury all others.

    away, back: names of the lines; level: of ``logging``, of the first.
    """

    def __init__(self, away: str = "store_away", back: str = "store_back", level: int = logging.WARNING) -> None:
        self._since_s: float | None = None
        self._failed_s = 0.0
        self._away, self._back, self._level = away, back, level
        self._told: set[str] = set()

    @property
    def lasts_s(self) -> float:
        """Seconds since the first failure after the last call that succeeded, or after a pause of ``ANEW_S``."""
        return 0.0 if self._since_s is None else time.monotonic() - self._since_s

    def goes_on(self, error: str, *, begun_s: float | None = None, **more: Any) -> None:
        """Note that the store did not answer, or took nothing in.

        begun_s: when it was asked, by ``time.monotonic``; just now when left out. more: of the line.
        """
        now = time.monotonic()
        begun_s = now if begun_s is None else begun_s
        if self._since_s is None or begun_s - self._failed_s >= ANEW_S:
            self._since_s = now
        self._failed_s = now
        if error not in self._told:
            _log.log(self._level, self._away, error=error, **more)
        self._told.add(error)

    def is_over(self, **more: Any) -> None:
        """Note that it answered."""
        if self._since_s is not None:
            _log.warning(self._back, **more)
        self._since_s = None
        self._told.clear()
