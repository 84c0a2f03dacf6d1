"""Whether an engine call has been under way for too long, seen from outside the process it runs in.

The child notes each call in a few bytes of shared memory, so that it is seen even when a call that hangs holds
every lock of the interpreter.
"""

from __future__ import annotations

import mmap
import struct
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any

from numpy.typing import NDArray

from engines.backends.base import EngineBackend, Rows
from server.engine_around import EngineAround

_NOTE = struct.Struct("=d")
LIMIT_OF_MEDIAN = 6.0
"""A call may take three times its 99th percentile, and that at most twice the measured median."""


class CallWatch:
    """A deadline in shared memory: seconds of ``time.perf_counter``, which all processes share, or 0 when idle."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, mmap.PAGESIZE)

    @contextmanager
    def calling(self, limit_s: float) -> Iterator[None]:
        """Note a call that should end within limit_s."""
        _NOTE.pack_into(self._memory, 0, time.perf_counter() + limit_s)
        try:
            yield
        finally:
            self.clear()

    def clear(self) -> None:
        _NOTE.pack_into(self._memory, 0, 0.0)

    @property
    def late(self) -> bool:
        deadline: float = _NOTE.unpack_from(self._memory, 0)[0]
        return 0 < deadline < time.perf_counter()


def shared_page() -> IO[bytes]:
    """An unnamed file of one page, to be mapped by both sides."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 - its user closes it
    file.truncate(mmap.PAGESIZE)
    return file


class WatchedEngine(EngineAround):
    """An engine whose every call is noted. ms: median by rows; floor_s: least time a call is given."""

    def __init__(self, engine: EngineBackend, ms: Mapping[int, float], watch: CallWatch, floor_s: float) -> None:
        super().__init__(engine)
        self._ms = ms
        self._watch = watch
        self._floor_s = floor_s

    def run(self, rows: Rows) -> dict[str, NDArray[Any]]:
        with self._watch.calling(self._limit_s(len(next(iter(rows.values()))))):
            return self._engine.run(rows)

    def _limit_s(self, rows: int) -> float:
        return max(self._floor_s, LIMIT_OF_MEDIAN * self._ms.get(rows, 0.0) / 1000)
