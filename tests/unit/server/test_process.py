"""A process around fake engines, in a thread: what its end does to accepted work."""

from __future__ import annotations

import faulthandler
import gc
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from server import start as starting
from server.engine_thread import EngineThread
from server.errors import StartError
from server.process import Process, bind
from server.service import Service
from server.settings import Settings
from server.stores.base import StoreUnavailableError
from server.stores.memory import MemoryStore
from server.versions import read_versions
from server.webhooks import Webhooks
from server.worker import Worker
from tests.support.fake_engines import Bench
from tests.support.offline import offline_client, offline_service
from tests.support.serving import until

URL = "/v1/images/generations"


@dataclass
class Lab:
    """A running process, its parts, and what it ends with."""

    bench: Bench
    service: Service
    process: Process
    url: str
    ended: Future[str | None]
    pool: ThreadPoolExecutor

    def post(self) -> Future[httpx.Response]:
        return self.pool.submit(httpx.post, self.url + URL, json={"prompt": "one"}, timeout=30)

    def accepted(self, count: int) -> None:
        value = self.service.metrics.registry.get_sample_value
        labels = {"model": "toy-digits", "task": "text_to_image"}
        until(lambda: value("halfstep_requests_accepted_total", labels) == count, "accepted")


Start = Callable[..., Lab]


@pytest.fixture
def start(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("server.process.OVERTIME_S", 600)  # these processes are threads of this one
    labs: list[Lab] = []

    def make(**settings: Any) -> Lab:
        bench, ready = Bench(toy_bundle), Queue[str]()
        service = offline_service(toy_bundle, Settings(**settings))
        engine = EngineThread({"toy-digits": bench.pipeline})
        worker = Worker("w", engine, service.store, service.metrics, max_rows=service.settings.max_rows)
        process = Process(service, worker, bind("127.0.0.1", 0), ready.put)
        pool = ThreadPoolExecutor(8)
        labs.append(Lab(bench, service, process, "", pool.submit(process.run_until_told), pool))
        labs[-1].url = ready.get(timeout=30)
        return labs[-1]

    yield make
    for lab in labs:
        lab.process.should_exit = True
        lab.bench.allow()
        with suppress(Exception, SystemExit):
            lab.ended.result(timeout=60)
        lab.pool.shutdown()
    faulthandler.cancel_dump_traceback_later()


def test_serve_is_not_ready_while_its_engine_is_down(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SimpleNamespace(versions=read_versions(Settings(bundles=(toy_bundle,))), offers={}, pid=1, up=False)
    served: list[Service] = []

    def process(service: Service, *_: Any, **__: Any) -> Any:
        served.append(service)
        return SimpleNamespace(run_until_told=lambda: None)

    monkeypatch.setattr(starting, "_open_engine", lambda *_, **__: engine)
    monkeypatch.setattr(starting, "_worker", lambda *_: None)
    monkeypatch.setattr(starting, "Process", process)
    starting.serve(Settings(bundles=(toy_bundle,), port=0))
    client = offline_client(served[0])
    down = client.get("/readyz")
    assert (down.status_code, down.json()["status"]) == (503, "engine_down")
    engine.up = True
    assert client.get("/readyz").status_code == 200


def test_what_is_loaded_is_no_garbage_once_a_process_serves(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen: list[str] = []
    told = SimpleNamespace(run_until_told=lambda: None)
    engine = SimpleNamespace(versions=read_versions(Settings(bundles=(toy_bundle,))), offers={}, pid=1, up=True)

    def process(*arguments: Any, **_: Any) -> Any:
        ready = next(each for each in arguments if getattr(each, "__name__", "") == "ready")
        ready("http://here")
        frozen.append(capsys.readouterr().out)
        return told

    monkeypatch.setattr(starting, "_open_engine", lambda *_, **__: engine)
    monkeypatch.setattr(starting, "_worker", lambda *_: None)
    monkeypatch.setattr(starting, "Process", process)
    monkeypatch.setattr(starting, "WorkerProcess", process)
    monkeypatch.setattr(gc, "freeze", lambda: starting._out.print("frozen"))
    settings = Settings(bundles=(toy_bundle,), port=0, redis="redis://127.0.0.1:1")
    for start in (starting.serve, starting.api, starting.worker):
        start(settings)
    assert [said.split("\n")[0] for said in frozen] == ["frozen"] * 3


def test_a_drain_that_times_out_answers_what_it_gives_up(start: Start) -> None:
    lab = start(drain_timeout_s=4, max_rows=10)
    lab.bench.hold()
    answers = [lab.post() for _ in range(3)]
    lab.accepted(3)
    lab.process.handle_exit(signal.SIGTERM, None)
    for answer in answers:
        response = answer.result(timeout=60)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "draining")
        assert int(response.headers["retry-after"]) >= 1
    lab.bench.allow()
    assert "3 accepted requests" in str(lab.ended.result(timeout=60))
    sample = lab.service.metrics.registry.get_sample_value
    labels = {"model": "toy-digits", "task": "text_to_image", "size": "64x64", "status": "failed"}
    assert sample("halfstep_requests_total", labels) == 3


def test_a_drain_without_work_ends_well(start: Start) -> None:
    lab = start()
    assert lab.post().result(timeout=60).status_code == 200
    lab.process.handle_exit(signal.SIGTERM, None)
    assert lab.ended.result(timeout=60) is None


def test_a_second_signal_ends_at_once(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(status: int) -> None:
        raise SystemExit(status)

    lab = start()
    lab.bench.hold()
    lab.post()
    lab.accepted(1)
    monkeypatch.setattr("server.process.os._exit", leave)
    lab.process.handle_exit(signal.SIGTERM, None)
    with pytest.raises(SystemExit, match="1"):
        lab.process.handle_exit(signal.SIGTERM, None)


def test_a_stuck_engine_call_does_not_hold_the_process(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr("server.process.os._exit", leave)
    lab = start(drain_timeout_s=4)
    lab.bench.hold()
    answer = lab.post()
    lab.accepted(1)
    lab.process.handle_exit(signal.SIGTERM, None)
    assert answer.result(timeout=60).status_code == 503
    with pytest.raises(SystemExit, match="1"):
        lab.ended.result(timeout=60)


NEVER_ENDS = """
import os, signal
from server import process
from server.metrics import Metrics
from server.settings import Settings

process.OVERTIME_S = -3.5
told = lambda url: os.kill(os.getpid(), signal.SIGTERM)
process.DrainingServer(None, Settings(drain_timeout_s=4), Metrics(), process.bind("127.0.0.1", 0), told).hear()
"""


def test_a_process_that_does_not_end_is_ended_and_says_where_it_was() -> None:
    command = [sys.executable, "-c", NEVER_ENDS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert "Timeout" in done.stderr
    assert "in main_loop" in done.stderr or "in run" in done.stderr


TOLD_WHILE_LOADING = """
import os, signal, time
import server.start
from server.cli import app

server.start.worker = lambda settings: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(100)
app(["worker", "--redis", "redis://127.0.0.1:1"])
"""


def test_a_process_that_is_told_to_end_while_it_loads_ends_well() -> None:
    """By a handler: the first process of a container has no default one."""
    command = [sys.executable, "-c", TOLD_WHILE_LOADING]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_dead_worker_fails_what_waits_and_turns_new_work_away(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = start(max_rows=10)
    lab.bench.hold()
    held = lab.post()
    lab.accepted(1)
    until(lambda: lab.bench.batches, "the first is in the making")
    queued = lab.post()
    lab.accepted(2)
    monkeypatch.setattr("server.engine_thread.EngineThread._decode", None)
    lab.bench.allow()
    assert (held.result(timeout=60).status_code, held.result().json()["error"]["code"]) == (500, "engine_error")
    response = queued.result(timeout=60)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_down")
    assert int(response.headers["retry-after"]) >= 1
    assert "task of this process failed" in str(lab.ended.result(timeout=60))


def test_a_drain_ends_in_time_though_the_store_is_away(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(*_: object) -> bool:
        raise StoreUnavailableError("away")

    lab = start(drain_timeout_s=4, max_rows=10)
    lab.bench.hold()
    answer = lab.post()
    lab.accepted(1)
    monkeypatch.setattr(lab.service.store, "abandon", away)
    lab.process.handle_exit(signal.SIGTERM, None)
    until(lambda: lab.process.should_exit, "the drain is over", 60)
    lab.bench.allow()
    lab.ended.result(timeout=60)
    assert answer.done()


def test_a_port_that_another_took_while_this_process_loaded_is_one_sentence(toy_bundle: Path) -> None:
    """Bound, two may wait for a port; one may listen."""
    service = offline_service(toy_bundle, Settings())
    mine = bind("127.0.0.1", 0)
    port = mine.getsockname()[1]
    with bind("127.0.0.1", port) as other:
        other.listen()
        with pytest.raises(StartError, match=f"port {port} any more"):
            Process(service, None, bind("127.0.0.1", 0), print, mine).run_until_told()
        with pytest.raises(StartError, match=f"port {port} any more"):
            Process(service, None, mine, print).run_until_told()


def test_an_outage_of_the_store_is_logged_once_with_its_reason(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    async def away() -> dict[str, Any]:
        tries.append("one")
        raise StoreUnavailableError("refused")

    monkeypatch.setattr("server.process.LOOK_AT_OFFERS_S", 0.01)
    with capture_logs() as logs:
        lab = start()
        with monkeypatch.context() as outage:
            outage.setattr(lab.service.store, "offers", away)
            until(lambda: len(tries) > 3, "it was tried again")
        until(lambda: any(line["event"] == "store_back" for line in list(logs)), "it is back")
    told = [(line["event"], line.get("error")) for line in logs if line["event"].startswith("store_")]
    assert told == [("store_away", "refused"), ("store_back", None)]


def test_webhooks_that_fail_for_good_end_the_process(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(_: Webhooks) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(Webhooks, "run", broken)
    assert "task of this process failed" in str(start().ended.result(timeout=60))


def test_new_work_is_refused_while_the_engine_is_down(toy_bundle: Path) -> None:
    service = offline_service(toy_bundle)
    service.engine_down = True
    response = offline_client(service).post(URL, json={"prompt": "one"})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_down")


def test_what_the_store_may_lose_is_said_at_the_start_and_after_an_outage(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away() -> dict[str, Any]:
        raise StoreUnavailableError("refused")

    async def risks(_: MemoryStore) -> list[str]:
        return ["appendonly is no"]

    monkeypatch.setattr("server.process.LOOK_AT_OFFERS_S", 0.01)
    monkeypatch.setattr(MemoryStore, "risks", risks)
    with capture_logs() as logs:
        lab = start()
        for told in (1, 2):
            until(lambda told=told: said(logs, "store_may_lose_jobs") == told, "it is said")  # type: ignore[misc]
            with monkeypatch.context() as outage:
                outage.setattr(lab.service.store, "offers", away)
                until(lambda told=told: said(logs, "store_away") == told, "it is away")  # type: ignore[misc]
        until(lambda: said(logs, "store_back") == 2, "it is back")
    (line,) = {tuple(line["because"]) for line in logs if line["event"] == "store_may_lose_jobs"}
    assert line == ("appendonly is no",)


def said(logs: list[Any], event: str) -> int:
    return sum(line["event"] == event for line in list(logs))
