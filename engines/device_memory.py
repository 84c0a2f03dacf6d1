"""What engines hold of a GPU's memory."""

from __future__ import annotations

from engines.backends.cuda import memory_in_use
from engines.backends.load import ON_GPU, BackendName


class DeviceMemory:
    """What is taken of the memory of a backend's GPU from now on, by whatever process; make it before engines load.

    Raises: BackendError when there is no GPU for a backend that needs one.
    """

    def __init__(self, backend: BackendName) -> None:
        self._before = memory_in_use() if backend in ON_GPU else None

    def taken_mb(self) -> float | None:
        """10^6 bytes, below 0 where more was given back; None for the CPU, which has the host's memory only."""
        return None if self._before is None else (memory_in_use() - self._before) / 1e6
