"""What ``test_confined`` runs as uid 65534, read-only and with loopback only: an API, a worker and their Redis."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import pytest

from tests.support.redis_server import RedisServer
from tests.support.serving import ROOT, until

EXIT_S = 180
"""For what hangs; how long a drain takes is another test's business."""


class Service(NamedTuple):
    """url: of the API; metrics: of its other port; processes: all there are."""

    url: str
    metrics: str
    processes: list[psutil.Process]


@contextmanager
def running(log: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """``python -m server …``, which must end well when it is told to."""
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "server", *words],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "HALFSTEP_CACHE_DIR": "none",
                "HALFSTEP_RUNGS": "1,2",
                "OMP_NUM_THREADS": "1",
                "COLUMNS": "200",
            },
        )
        try:
            yield process
            process.send_signal(signal.SIGTERM)
            assert process.wait(EXIT_S) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()


def announced(process: subprocess.Popen[str], log: Path, word: str) -> str:
    """The URL a process printed behind a word."""

    def look() -> str:
        text = log.read_text()
        assert process.poll() is None, text
        found = re.search(rf"^{word}\s+(\S+)", text, re.M)
        return found[1] if found else ""

    return until(look, f"{word} in {log.name}", limit_s=180)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    logs = tmp_path_factory.mktemp("logs")
    worker_log, api_log = logs / "worker.log", logs / "api.log"
    with (
        RedisServer() as redis,
        running(worker_log, "worker", "--redis", redis.url, "--metrics-port", "0") as worker,
        running(api_log, "api", "--redis", redis.url, "--port", "0", "--metrics-port", "0") as api,
    ):
        announced(worker, worker_log, "Metrics")
        url = announced(api, api_log, "Playground").rstrip("/")
        metrics = announced(api, api_log, "Metrics").removesuffix("/metrics")
        started = [psutil.Process(p.pid) for p in (worker, api)]
        yield Service(url, metrics, [*started, *(c for p in started for c in p.children(recursive=True))])


def test_it_draws(service: Service) -> None:
    body = {"prompt": "seven", "seed": 7, "n": 2}
    answer = httpx.post(f"{service.url}/v1/images/generations", json=body, timeout=120)
    assert answer.status_code == 200
    assert len(answer.json()["data"]) == 2


def test_probes_and_metrics_have_a_port_of_their_own(service: Service) -> None:
    assert service.url != service.metrics
    for path in ("livez", "readyz"):
        assert httpx.get(f"{service.metrics}/{path}").status_code == 200
    assert "halfstep_queued_seconds" in httpx.get(f"{service.metrics}/metrics").text
    assert httpx.get(f"{service.metrics}/v1/models").status_code == 404


def test_no_process_has_privileges(service: Service) -> None:
    assert len(service.processes) >= 3
    for process in service.processes:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        status = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
        assert set(status["Uid"].split()) == set(status["Gid"].split()) == {"65534"}
        assert status["NoNewPrivs"] == "1"
        assert int(status["CapEff"], 16) == 0


def test_every_socket_is_on_loopback(service: Service) -> None:
    for process in service.processes:
        for connection in process.net_connections("inet"):
            for address in (connection.laddr, connection.raddr):
                assert not address or address.ip in ("127.0.0.1", "::1")
