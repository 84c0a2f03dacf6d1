"""``api`` and ``worker`` as users start them, over a Redis that comes and goes."""

from __future__ import annotations

import base64
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.command import Command
from tests.support.redis_server import RedisServer
from tests.support.serving import until


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("many")


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer("", "always") as server:
        yield server


@pytest.fixture(scope="module")
def processes(redis: RedisServer, toy_bundle: Path, folder: Path) -> Iterator[tuple[Command, Command]]:
    with ExitStack() as stack:
        worker = Command("worker", redis.url, toy_bundle, folder)
        stack.callback(worker.end)
        api = Command("api", redis.url, toy_bundle, folder)
        stack.callback(api.end)
        for process in (worker, api):
            process.wait_ready()
        yield api, worker


def draw(api: Command, seed: int = 1, **fields: object) -> httpx.Response:
    body = {"prompt": "one", "seed": seed, **fields}
    return httpx.post(f"{api.url}/v1/images/generations", json=body, timeout=60)


def image(api: Command, seed: int = 1) -> bytes:
    answer = draw(api, seed)
    assert answer.status_code == 200, answer.text
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def test_images_are_the_same_on_every_worker_and_after_every_restart(
    processes: tuple[Command, Command], redis: RedisServer, toy_bundle: Path, folder: Path
) -> None:
    api, worker = processes
    alone = [image(api, seed) for seed in range(4)]
    batch = draw(api, 0, n=4).json()["data"]
    assert [base64.b64decode(each["b64_json"]) for each in batch] == alone
    (child,) = psutil.Process(worker.process.pid).children()
    child.kill()
    assert [image(api, seed) for seed in range(4)] == alone
    worker.process.send_signal(signal.SIGSTOP)
    other = Command("worker", redis.url, toy_bundle, folder)
    try:
        other.wait_ready()
        assert [image(api, seed) for seed in range(4)] == alone
        other.process.terminate()
        assert other.process.wait(40) == 0
    finally:
        other.end()
        worker.process.send_signal(signal.SIGCONT)


def test_a_stream_comes_through_the_store(processes: tuple[Command, Command]) -> None:
    api, _ = processes
    answer = draw(api, steps=8, stream=True, partial_images=2)
    events = [line.removeprefix("event: ") for line in answer.text.splitlines() if line.startswith("event: ")]
    assert events == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]


def test_redis_away_is_said_and_survived(processes: tuple[Command, Command], redis: RedisServer) -> None:
    api, worker = processes
    before = image(api)
    redis.freeze()
    try:
        refused = draw(api)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert int(refused.headers["retry-after"]) >= 1
        for process in processes:
            until(lambda process=process: process.status("/readyz") == 503, "readyz is false")  # type: ignore[misc]
            assert process.status("/livez") == 200
            assert process.status("/metrics") == 200
    finally:
        redis.thaw()
    for process in processes:
        process.wait_ready()
    assert image(api) == before
    redis.kill()
    assert draw(api).status_code == 503
    redis.start()
    for process in processes:
        process.wait_ready()
    assert image(api) == before
    assert worker.process.poll() is None


def test_the_metrics_tell_of_all_processes(processes: tuple[Command, Command]) -> None:
    api, worker = processes
    image(api)
    for process in (api, worker):
        text = httpx.get(f"{process.url}/metrics", timeout=10).text
        counts = {
            name: sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"{name}{{"))
            for name in ("halfstep_jobs_accepted_total", "halfstep_jobs_total")
        }
        assert counts["halfstep_jobs_accepted_total"] == counts["halfstep_jobs_total"] > 0
        role = "api" if process is api else "worker"
        assert f'halfstep_process_info{{role="{role}"}} 1.0' in text
        assert ("halfstep_parity_error{" in text) == (role == "api")
