"""APIs, workers and a Redis as processes of their own, and what can happen to them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import httpx
import redis

from tests.support.redis_server import RedisServer
from tests.support.serving import ROOT, cache_dir, until

EXIT_S = 40
_NOTHING: Mapping[str, str] = {}
SHORTAGE_S = 1.5
CUTS = 8


class Node:
    """One process, which keeps its port however often it is started. environment: settings of its own."""

    def __init__(
        self, role: str, url: str, bundle: Path, plant: str, log: IO[str], environment: Mapping[str, str] = _NOTHING
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        module = [sys.executable, "-m", "tests.chaos.node"]
        self._command = [*module, role, url, str(bundle), str(self.port), plant]
        self._log = log
        self._environment = {"HALFSTEP_CACHE_DIR": cache_dir(), **os.environ, **environment}
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, cwd=ROOT, stderr=self._log, env=self._environment)

    def restart(self) -> None:
        """SIGKILL, and another in its place."""
        self.process.kill()
        self.process.wait()
        self.start()

    def terminate(self) -> int:
        """SIGTERM; the exit status."""
        self.process.terminate()
        return self.process.wait(EXIT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def end(self) -> None:
        """SIGKILL, frozen or not."""
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False


class Fleet:
    """log: where the processes write; environment: settings of all of them."""

    def __init__(
        self,
        bundle: Path,
        apis: int,
        workers: int,
        plant: str,
        log: Path,
        environment: Mapping[str, str] = _NOTHING,
    ) -> None:
        self._log = log.open("a")
        self.redis = RedisServer("", None if plant == "not_durable" else "always")
        place = self.redis.url, bundle, plant, self._log, environment
        self.apis = [Node("api", *place) for _ in range(apis)]
        self.workers = [Node("worker", *place) for _ in range(workers)]

    def wait_ready(self) -> None:
        for node in (*self.apis, *self.workers):
            until(lambda node=node: node.ready, "a process is ready", 120)  # type: ignore[misc]

    def has_jobs(self, worker: Node) -> bool:
        """The store believes that this worker holds some."""
        client, name = self.redis.client, f"{socket.gethostname()}-{worker.process.pid}".encode()
        try:
            running = client.smembers("halfstep:taken")
            return any(client.hget(b"halfstep:job:" + job, "worker") == name for job in running)
        except redis.RedisError:
            return False

    def kill_redis(self) -> None:
        self.redis.kill()
        time.sleep(0.2)
        self.redis.start()

    def cut_connections(self) -> None:
        """All of them, every 200 ms for a while."""
        for _ in range(CUTS):
            for kind in ("normal", "pubsub"):
                self.redis.client.client_kill_filter(_type=kind, skipme=True)
            time.sleep(0.2)

    def exhaust_memory(self) -> None:
        """Nothing that needs memory is taken in for a while."""
        self.redis.client.config_set("maxmemory", 1)
        time.sleep(SHORTAGE_S)
        self.redis.client.config_set("maxmemory", 0)

    def fill_disk(self) -> None:
        """A durable Redis ends at the next write; it is started again once there is room."""
        self.redis.fill_disk()
        self.redis.process.wait(EXIT_S)
        time.sleep(0.2)
        self.redis.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for node in (*self.apis, *self.workers):
            node.end()
        self.redis.__exit__(None, None, None)
        self._log.close()
