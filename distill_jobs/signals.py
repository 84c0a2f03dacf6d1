"""Signals that ask a job to stop."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopSignal:
    """Set by the first SIGTERM or SIGINT; the second ends the process at once."""

    received: bool = False

    @contextmanager
    def listening(self) -> Iterator[StopSignal]:
        handled = (signal.SIGTERM, signal.SIGINT)
        previous = [signal.signal(number, self._receive) for number in handled]
        try:
            yield self
        finally:
            for number, handler in zip(handled, previous, strict=True):
                signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = True


def stop_with_launcher() -> None:
    """Ask the kernel for a SIGTERM when the launcher that started this process dies; Linux only.

    torchrun ends its workers when it is asked to stop, but not when it is killed.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
