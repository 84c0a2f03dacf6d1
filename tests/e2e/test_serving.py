"""What a running process promises: same bytes in any company, isolation, cancellation, drain."""

from __future__ import annotations

import asyncio
import itertools
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support.serving import ROOT, ServerProcess, until

URL = "/v1/images/generations"


def metric(client: httpx.Client, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return sum(float(value) for value in lines)


def batches(client: httpx.Client) -> float:
    """Steps that the engine has run, of however many rows."""
    return metric(client, "halfstep_batch_occupancy_ratio_count")


def mixed_requests() -> list[dict[str, Any]]:
    models = [("toy-digits", n) for n in (1, 2, 4, 8)] + [("toy-poison", n) for n in (1, 2, 4, 8)]
    choices = itertools.product(models, (1.0, 2.5), ("png", "webp"), (1, 3))
    prompts = itertools.cycle(["zero", "a three", "7", "the digit nine"])
    return [
        {"model": m, "steps": steps, "guidance_scale": w, "output_format": f, "n": n, "prompt": p, "seed": i}
        for i, (((m, steps), w, f, n), p) in enumerate(zip(choices, prompts, strict=False))
    ]


async def all_at_once(url: str, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        return await asyncio.gather(*(client.post(URL, json=body) for body in bodies))


def test_company_does_not_change_a_byte(server: ServerProcess, client: httpx.Client) -> None:
    bodies = mixed_requests()
    began = batches(client)
    alone = [client.post(URL, json=body).json()["data"] for body in bodies]
    apart = batches(client)
    for answer, expected in zip(asyncio.run(all_at_once(server.url, bodies)), alone, strict=True):
        assert answer.status_code == 200
        assert answer.json()["data"] == expected
    assert batches(client) - apart < apart - began


def test_a_poisonous_row_fails_alone(server: ServerProcess, client: httpx.Client) -> None:
    prompts = ["five", "six", "seven"] * 5
    bodies = [{"model": "toy-poison", "prompt": p, "seed": i, "steps": 8} for i, p in enumerate(prompts)]
    alone = {i: client.post(URL, json=body).json() for i, body in enumerate(bodies) if body["prompt"] != "six"}
    for i, answer in enumerate(asyncio.run(all_at_once(server.url, bodies))):
        if prompts[i] == "six":
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "non_finite")
        else:
            assert answer.json()["data"] == alone[i]["data"]


def test_a_disconnect_frees_the_rows(server: ServerProcess, client: httpx.Client) -> None:
    cancelled, began = metric(client, "halfstep_cancelled_steps_total"), batches(client)
    accepted = metric(client, "halfstep_requests_accepted_total")
    host, port = urlsplit(server.url).netloc.split(":")
    body = b'{"model": "toy-slow", "prompt": "one", "n": 10}'
    head = (
        f"POST {URL} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with ThreadPoolExecutor(1) as pool:
        gone = [socket.create_connection((host, int(port))) for _ in range(4)]
        for connection in gone:
            connection.sendall(head.encode() + body)
        until(lambda: batches(client) > began, "a request is being made: one that is not has no steps to cancel")
        companion = pool.submit(client.post, URL, json={"model": "toy-slow", "prompt": "two", "seed": 9, "n": 5})
        until(lambda: metric(client, "halfstep_requests_accepted_total") == accepted + 5, "all were accepted")
        for connection in gone:
            connection.close()
        until(lambda: metric(client, "halfstep_cancelled_steps_total") > cancelled, "its steps were cancelled")
        answer = companion.result()
    until(lambda: metric(client, "halfstep_rows_in_flight") == 0, "all rows were freed")
    alone = client.post(URL, json={"model": "toy-slow", "prompt": "two", "seed": 9, "n": 5})
    assert answer.json()["data"] == alone.json()["data"]


def test_every_accepted_request_is_counted_once(client: httpx.Client) -> None:
    def counted() -> tuple[float, float]:
        return metric(client, "halfstep_requests_accepted_total"), metric(client, "halfstep_requests_total")

    until(lambda: len({*counted()}) == 1, "those before are counted")
    (before, _) = counted()
    client.post(URL, json={"prompt": "one"})
    until(lambda: counted() == (before + 1, before + 1), "the request is counted, and its end")
    # Ends of jobs are looked for now and then: once this one's is counted, so is a second of the request's.
    client.post("/v1/jobs", json={"task": "text_to_image", "prompt": "one"})
    until(lambda: counted() == (before + 2, before + 2), "the job is counted, and its end")


def test_a_drain_loses_nothing(slow_bundle: Path, tmp_path: Path) -> None:
    server = ServerProcess([slow_bundle], log=tmp_path / "log")
    body = {"prompt": "one", "n": 10, "seed": 1}
    with ThreadPoolExecutor(4) as pool, httpx.Client(base_url=server.url, timeout=60) as probe:
        accepted = [pool.submit(httpx.post, server.url + URL, json=body, timeout=60) for _ in range(4)]
        until(lambda: metric(probe, "halfstep_requests_accepted_total") == 4, "all were accepted")
        server.terminate()
        until(lambda: probe.get("/readyz").status_code == 503, "readyz turns false")
        assert probe.get("/livez").status_code == 200
        late = probe.post(URL, json=body)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
        assert int(late.headers["retry-after"]) >= 1
        answers = [request.result() for request in accepted]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert all(answer.json()["data"] == answers[0].json()["data"] for answer in answers)
    assert server.wait() == 0


def test_a_full_queue_says_when_to_come_back(slow_bundle: Path, tmp_path: Path) -> None:
    server = ServerProcess([slow_bundle], "--max-queue-s", "0.05", log=tmp_path / "log")
    try:
        body = {"prompt": "one", "n": 10}
        answers = asyncio.run(all_at_once(server.url, [body] * 20))
        refused = [answer for answer in answers if answer.status_code == 503]
        assert {answer.status_code for answer in answers} == {200, 503}
        for answer in refused:
            assert answer.json()["error"]["code"] == "queue_full"
            assert int(answer.headers["retry-after"]) * 1000 >= int(answer.headers["retry-after-ms"]) > 0
    finally:
        server.terminate()
        assert server.wait() == 0


def test_a_second_signal_ends_a_real_process_at_once(slow_bundle: Path, tmp_path: Path) -> None:
    server = ServerProcess([slow_bundle], log=tmp_path / "log")
    with ThreadPoolExecutor(8) as pool, httpx.Client(base_url=server.url, timeout=60) as probe:
        for _ in range(8):
            pool.submit(httpx.post, server.url + URL, json={"prompt": "one", "n": 10}, timeout=60)
        until(lambda: metric(probe, "halfstep_requests_accepted_total") == 8, "all were accepted")
        server.terminate()
        until(lambda: probe.get("/readyz").status_code == 503, "readyz turns false")
        server.terminate()
        assert server.wait() == 1
    assert "ended_by_second_signal" in (tmp_path / "log").read_text()


def run_serve(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", "serve", *flags]
    env = {"PATH": "/usr/bin:/bin", "COLUMNS": "200", **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_a_missing_bundle_is_one_sentence(tmp_path: Path) -> None:
    ended = run_serve("--port", "0", "--bundle", str(tmp_path / "nothing"))
    assert ended.returncode == 1
    assert "is not a folder" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_port_in_use_is_one_sentence(toy_bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run_serve("--port", str(port), "--bundle", str(toy_bundle))
    assert ended.returncode == 1
    assert f"Port {port} on 127.0.0.1 is in use" in ended.stderr
    assert "--port" in ended.stderr


def test_flags_win_over_the_environment_and_mistakes_are_named(toy_bundle: Path) -> None:
    ended = run_serve("--bundle", str(toy_bundle), HALFSTEP_PORT="many")
    assert ended.returncode == 1
    assert "HALFSTEP_PORT" in ended.stderr
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = run_serve("--bundle", str(toy_bundle), "--port", port, HALFSTEP_PORT="many")
    assert "in use" in ended.stderr


def test_help_names_defaults_and_units() -> None:
    text = run_serve("--help").stdout
    assert "8000" in text
    assert "127.0.0.1" in text
    assert "seconds" in text


SMUGGLED = [
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
]


@pytest.mark.parametrize("request_bytes", SMUGGLED, ids=["CL+TE", "two CLs"])
def test_ambiguous_lengths_are_refused_and_closed(server: ServerProcess, request_bytes: bytes) -> None:
    host, port = urlsplit(server.url).netloc.split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request_bytes)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1
