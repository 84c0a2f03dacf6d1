"""One line a request, with its id, and nothing a client wrote."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import redirect_stderr
from typing import Any

import httpx
import pytest
import structlog
from starlette.types import Receive, Scope, Send

from server.api.access import AccessLog
from server.logs import configure_logs

pytestmark = pytest.mark.anyio

CANARY = "c4n4ry"


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What the process logs."""
    with redirect_stderr(io.StringIO()) as stderr:
        configure_logs("debug")
        yield stderr


def lines(written: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written.getvalue().splitlines()]


class _Route:
    path = "/v1/jobs/{job_id}"


async def _answers(scope: Scope, receive: Receive, send: Send) -> None:
    scope["route"] = _Route()
    structlog.get_logger().warning("inside")
    await send({"type": "http.response.start", "status": 201, "headers": []})
    await send({"type": "http.response.body", "body": b"abc", "more_body": True})
    await send({"type": "http.response.body", "body": b"de"})


async def _leaves(scope: Scope, receive: Receive, send: Send) -> None:
    pass


async def post(app: AccessLog, headers: dict[str, str]) -> httpx.Response:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        return await client.post(f"/v1/jobs/{CANARY}?{CANARY}", headers=headers, content=CANARY)


async def test_a_request_is_one_line_that_names_its_route(written: io.StringIO) -> None:
    answer = await post(AccessLog(_answers), {"x-request-id": "mine-1", "authorization": f"Bearer {CANARY}"})
    inside, access = lines(written)
    assert answer.headers["x-request-id"] == "mine-1"
    assert (inside["event"], inside["request_id"]) == ("inside", "mine-1")
    told = {name: access[name] for name in ("event", "request_id", "method", "route", "status", "bytes", "level")}
    assert told == {
        "event": "request",
        "request_id": "mine-1",
        "method": "POST",
        "route": "/v1/jobs/{job_id}",
        "status": 201,
        "bytes": 5,
        "level": "info",
    }
    assert access["ms"] >= 0
    assert CANARY not in written.getvalue()


@pytest.mark.parametrize("sent", ["two words", "x" * 129, "a\nb", ""])
async def test_an_id_that_is_not_plain_is_replaced(written: io.StringIO, sent: str) -> None:
    answer = await post(AccessLog(_answers), {"x-request-id": sent.replace("\n", "\x0b")})
    assert answer.headers["x-request-id"].startswith("req_")
    assert {line["request_id"] for line in lines(written)} == {answer.headers["x-request-id"]}


async def test_a_client_that_left_early_is_499(written: io.StringIO) -> None:
    scope = {"type": "http", "method": "GET", "path": f"/{CANARY}", "headers": []}
    await AccessLog(_leaves)(scope, None, None)  # type: ignore[arg-type]
    (access,) = lines(written)
    assert (access["status"], access["route"]) == (499, "none")


async def test_a_librarys_warning_has_the_same_form(written: io.StringIO) -> None:
    logging.getLogger("somebody").warning("careful with %s", "it")
    (line,) = lines(written)
    assert (line["event"], line["logger"], line["level"]) == ("careful with it", "somebody", "warning")
