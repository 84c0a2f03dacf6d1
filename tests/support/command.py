"""``api`` or ``worker`` as users start them, on a free port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import httpx

from tests.support.serving import ROOT, until

READY_S = 300
PORT_FLAGS = {"api": "--port", "worker": "--metrics-port"}


class Command:
    """``python -m MODULE COMMAND``. environment: beside that of the test; output: of both its streams."""

    def __init__(
        self,
        command: str,
        redis_url: str,
        bundle: Path,
        folder: Path,
        *,
        environment: Mapping[str, str] | None = None,
        output: IO[str] | None = None,
        module: str = "server",
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._client = httpx.Client(base_url=self.url, timeout=10)  # a new one for each look would cost a core
        flags = ["--redis", redis_url, "--bundle", str(bundle), PORT_FLAGS[command], str(port)]
        set_here = {"HALFSTEP_CACHE_DIR": str(folder / "cache"), "HALFSTEP_LOG_LEVEL": "warning"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, command, *flags],
            cwd=ROOT,
            stdout=output or subprocess.DEVNULL,
            stderr=output,
            env={**os.environ, **set_here, **(environment or {})},
        )

    def status(self, path: str) -> int:
        try:
            return self._client.get(path).status_code
        except httpx.HTTPError:
            return 0

    def wait_ready(self) -> None:
        until(lambda: self.status("/readyz") == 200, "the process is ready", READY_S)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._client.close()
