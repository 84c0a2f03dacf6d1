"""Clients that are slow, endless or ambiguous on purpose, against a listening process."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.live import Live, live

URL = b"/v1/images/generations"
POST = b"POST " + URL + b" HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def quick(toy_bundle: Path) -> Iterator[Live]:
    """Little patience, so that a test need not have more."""
    with live(toy_bundle, header_timeout_s=0.5, body_timeout_s=0.5) as running:
        yield running


def answer(connection: socket.socket) -> bytes:
    """All bytes until the server closes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def code(raw: bytes) -> tuple[int, str]:
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    assert len(body) <= 4096
    return int(head.split()[1]), json.loads(body)["error"]["code"]


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"G", (408, "header_timeout")),
        (b"\r\n\r\n", (408, "header_timeout")),
        (b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Slow: a", (408, "header_timeout")),
        (POST + b"Content-Length: 50\r\n\r\n", (408, "body_timeout")),
        (POST + b'Content-Length: 50\r\n\r\n{"prompt": ', (408, "body_timeout")),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab", (408, "body_timeout")),
    ],
    ids=["one byte", "blank lines", "half a header", "no body", "half a body", "half a chunk"],
)
def test_what_never_ends_is_408_and_closed(quick: Live, sent: bytes, expected: tuple[int, str]) -> None:
    before = quick.count("halfstep_requests_rejected_total", reason=expected[1])
    with quick.connect() as connection:
        connection.sendall(sent)
        raw = answer(connection)
    assert code(raw) == expected
    assert b"\r\nx-request-id: req_" in raw
    assert quick.count("halfstep_requests_rejected_total", reason=expected[1]) == before + 1


def test_an_idle_connection_is_closed_without_a_word(quick: Live) -> None:
    with quick.connect() as connection:
        assert answer(connection) == b""


def test_a_second_slow_request_on_a_connection_is_408_too(quick: Live) -> None:
    with quick.connect() as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET /livez HTT")
        first, _, second = answer(connection).partition(b'{"status":"ok"}')
    assert first.startswith(b"HTTP/1.1 200 ")
    assert code(second) == (408, "header_timeout")


def test_a_refused_body_is_cut_off_after_the_answer(quick: Live) -> None:
    with quick.connect() as connection:
        connection.sendall(b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nab")
        raw = answer(connection)
    assert raw.startswith(b"HTTP/1.1 404 ")


def test_a_request_under_way_has_no_deadline(quick: Live) -> None:
    quick.bench.hold()
    body = b'{"prompt": "one"}'
    with quick.connect() as connection, quick.connect() as other:
        connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        other.sendall(b"GET / HTTP/1.1\r\nHost:")
        answer(other)  # longer than any deadline here
        quick.bench.allow()
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "headers",
    [
        b"X-Large: " + b"a" * 90_000 + b"\r\n",
        b"".join(b"X-%d: a\r\n" % k for k in range(5_000)),
        b"X: " + b"a" * 10**6,
    ],
    ids=["90 kB", "5,000", "endless"],
)
def test_large_headers_are_431_and_closed(quick: Live, headers: bytes) -> None:
    with quick.connect() as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n" + headers)
        connection.sendall(b"\r\n")
        assert code(answer(connection)) == (431, "headers_too_large")


def test_a_forwarded_address_is_believed_only_from_trusted_proxies(toy_bundle: Path) -> None:
    """Seen through the address of our own links, which a proxy may set."""
    forged = {"x-forwarded-for": "6.6.6.6", "x-forwarded-proto": "https"}
    for trusted, scheme in (((), "http"), (("127.0.0.1",), "https")):
        with live(toy_bundle, trusted_proxies=trusted) as running, running.client() as client:
            location = client.post("/v1/jobs", json={"prompt": "one"}, headers=forged).json()["status_url"]
            assert location.startswith(f"{scheme}://")


@pytest.mark.parametrize("count", [500])
def test_slow_sockets_leave_others_alone(toy_bundle: Path, count: int) -> None:
    with live(toy_bundle) as running:
        slow = [running.connect() for _ in range(count)]
        try:
            for k, connection in enumerate(slow):
                connection.sendall(b"GET /li" if k % 2 else POST + b"Content-Length: 500\r\n\r\n{")
            with running.client() as client:
                assert all(client.get("/livez").status_code == 200 for _ in range(50))
                made = [client.post(URL.decode(), json={"prompt": "one", "seed": k}) for k in range(10)]
            assert {response.status_code for response in made} == {200}
        finally:
            for connection in slow:
                connection.close()
