"""SIGHUP: the bundles are read again, and new versions of them are taken up without a restart."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable

import structlog

from engines.errors import HalfstepError
from server.metrics import Metrics

Renew = Callable[[], Awaitable[None]]
"""Take up what lies there now. Raises: HalfstepError when it is refused; what was served goes on then."""

STDIN = 0

_log = structlog.get_logger()
_early = threading.Event()
"""Set where the signal came before anything could be renewed."""


def heed_early() -> None:
    """Remember the signal from now on, for ``Renewals`` to heed once they start; it would end the process."""
    if not os.isatty(STDIN):
        signal.signal(signal.SIGHUP, lambda *_: _early.set())


class Renewals:
    """Renews once for every signal, or for several that come while it does. Started in the event loop."""

    def __init__(self, renew: Renew, metrics: Metrics) -> None:
        self._renew = renew
        self._metrics = metrics
        self._told = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Heed the signal from now on; not where stdin is a terminal: there it means that the terminal is gone."""
        if os.isatty(STDIN):
            return
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._told.set)
        if _early.is_set():
            _early.clear()
            self._told.set()
        self._task = asyncio.create_task(self._run(), name="renewals")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            await self._told.wait()
            self._told.clear()
            try:
                await self._renew()
            except Exception as error:  # what is served goes on, whatever was wrong with the new
                unexpected = not isinstance(error, HalfstepError)
                _log.error("bundle_refused", reason=str(error), exc_info=unexpected)
                self._metrics.takeovers.labels("bundle", "refused").inc()
