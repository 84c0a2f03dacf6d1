"""The servers that the goodput benchmark compares, and how each is started and ended."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.benchmarks.results import Watch, own_s
from tests.benchmarks.wishes import OURS, RIVALS

ROOT = Path(__file__).parents[2]
START_S, END_S = 600.0, 20.0


@dataclass(frozen=True)
class Server:
    """arguments: after ``python -m``, {port} filled in; path: of its wishes; ready: a path that answers 200."""

    name: str
    arguments: tuple[str, ...]
    path: str
    ready: str


def servers(bundle: Path, litserve: tuple[int, float]) -> tuple[Server, ...]:
    """Ours, ours with whole requests batched, LitServe, eager torch. litserve: batch size and timeout in ms."""
    serve = ("serve", "--bundle", str(bundle), "--port", "{port}", "--log-level", "error")
    whole = ("tests.benchmarks.request_level", *serve)
    diffusers = ("tests.benchmarks.rivals", "diffusers", str(bundle), "{port}")
    return (
        Server("halfstep", ("server", *serve), OURS, "/readyz"),
        Server("halfstep, whole requests batched", whole, OURS, "/readyz"),
        litserve_server(bundle, *litserve),
        Server("FastAPI + diffusers", diffusers, RIVALS, "/health"),
    )


def litserve_server(bundle: Path, batch: int, wait_ms: float) -> Server:
    options = ("--batch", str(batch), "--wait-ms", str(wait_ms))
    arguments = ("tests.benchmarks.rivals", "litserve", str(bundle), "{port}", *options)
    return Server(f"LitServe, batch {batch}, {wait_ms:g} ms", arguments, RIVALS, "/health")


@dataclass(frozen=True)
class Running:
    """A server that has answered, and sleeps with all its processes until it is woken. session: its id."""

    server: Server
    url: str
    session: int

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let it run for a while; asleep again it takes no core from the others."""
        self._signal("CONT")
        try:
            yield
        finally:
            self.sleep()

    def sleep(self) -> None:
        self._signal("STOP")

    def end(self) -> None:
        """Ask it to end; a sleeping process hears it once it is awake."""
        self._signal("TERM")
        self._signal("CONT")

    def kill(self) -> None:
        self._signal("KILL")

    def _signal(self, name: str) -> None:
        subprocess.run(["pkill", f"-{name}", "-s", str(self.session)], check=False)


@contextmanager
def started(server: Server, log: Path, watch: Watch) -> Iterator[Running]:
    """A server that answers, asleep; it is ended afterwards with all its children, their CPU counted."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", *(part.format(port=port) for part in server.arguments)]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
        running = Running(server, f"http://127.0.0.1:{port}", process.pid)
        try:
            _await(running.url + server.ready, process, log)
            running.sleep()
            yield running
        finally:
            used_s, waited_s = _cpu_s(process.pid), own_s()
            running.end()
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
            running.kill()
            process.wait()
            watch.ran(max(0.0, used_s - (own_s() - waited_s)))


def _cpu_s(pid: int) -> float:
    """Of a process and its descendants so far."""
    total = 0.0
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for each in (parent, *parent.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                times = each.cpu_times()
                total += times.user + times.system
    return total


def _await(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"{url} never answered: {log.read_text()[-2000:]}")
