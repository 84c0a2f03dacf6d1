"""A real server process on a free loopback port, and a service without one."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).parents[2]
START_S = 60
STOP_S = 40

ValueT = TypeVar("ValueT")


@cache
def cache_dir() -> str:
    """Where servers keep costs and compiled models, so that only the first one of a bundle measures."""
    folder = tempfile.mkdtemp(prefix="halfstep-cache-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class ServerProcess:
    """``python -m server serve`` as a user starts it. output: what it printed until it was ready."""

    def __init__(self, bundles: Sequence[Path], *flags: str, log: Path) -> None:
        command = [sys.executable, "-m", "server", "serve", "--port", "0", *flags]
        for bundle in bundles:
            command += ["--bundle", str(bundle)]
        self._log = log.open("w")
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={"HALFSTEP_CACHE_DIR": cache_dir(), **os.environ, "COLUMNS": "200"},
        )
        self.output = ""
        self.url = self._read_url()

    def _read_url(self) -> str:
        stdout = self.process.stdout
        assert stdout is not None
        url = ""
        for line in stdout:
            self.output += line
            if line.startswith("Playground"):
                url = line.split()[1].rstrip("/")
            if "curl" in line:
                return url
        raise AssertionError(f"the server did not start: {Path(self._log.name).read_text()}")

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Exit status; the process is killed when it does not end."""
        try:
            return self.process.wait(STOP_S)
        finally:
            self.process.kill()
            self.process.communicate()
            self._log.close()


@contextmanager
def serving(bundles: Sequence[Path], *flags: str, log: Path) -> Iterator[ServerProcess]:
    """A running server, ended with SIGTERM."""
    server = ServerProcess(bundles, *flags, log=log)
    try:
        yield server
    finally:
        server.terminate()
        server.wait()


def until(condition: Callable[[], ValueT], what: str, limit_s: float = 30.0) -> ValueT:
    """Poll until the condition holds; its value. Raises: AssertionError naming what never happened."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.005)  # between two looks, not to wait for anything
    raise AssertionError(f"never happened: {what}")
