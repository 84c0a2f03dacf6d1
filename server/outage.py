"""An outage of a store in the log: why it began, each new reason once, and its end."""

from __future__ import annotations

import logging
import time
from typing import Any

import structlog

_log = structlog.get_logger()


class Outage:
    """Of one process, whatever of it finds the store away: a line for each call that fails would bury all others.

    away, back: names of the lines; level: of ``logging``, of the first.
    """

    def __init__(self, away: str = "store_away", back: str = "store_back", level: int = logging.WARNING) -> None:
        self._since_s: float | None = None
        self._away, self._back, self._level = away, back, level
        self._told: set[str] = set()

    @property
    def lasts_s(self) -> float:
        """Seconds since the first call that failed of those after the last that did not."""
        return 0.0 if self._since_s is None else time.monotonic() - self._since_s

    def goes_on(self, error: str, **more: Any) -> None:
        """Note that the store did not answer, or took nothing in. more: of the line."""
        if self._since_s is None:
            self._since_s = time.monotonic()
        if error not in self._told:
            _log.log(self._level, self._away, error=error, **more)
        self._told.add(error)

    def is_over(self, **more: Any) -> None:
        """Note that it answered."""
        if self._since_s is not None:
            _log.warning(self._back, **more)
        self._since_s = None
        self._told.clear()
