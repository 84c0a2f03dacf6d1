"""The outermost ASGI layer: a request id on every response and every log line, and one access line a request."""

from __future__ import annotations

import re
import secrets
import time

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from server.tracing import request_span

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_QUIET = frozenset({"/livez", "/readyz", "/metrics"})
_log = structlog.get_logger()


class AccessLog:
    """Puts ``x-request-id`` on every response: the client's own where it sent a plain one.

    The line names the route, not the path, and no header or body, so it cannot hold what a client wrote.
    Probes and scrapes that succeed are logged at debug.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        begun = time.perf_counter()
        status, sent_bytes = 499, 0  # nginx's number for a client that left before its answer

        async def counted(message: Message) -> None:
            nonlocal status, sent_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            else:
                sent_bytes += len(message.get("body", b""))
            await send(message)

        traced = scope["path"] not in _QUIET
        with (
            request_span(scope["method"], scope["headers"], traced=traced) as span,
            bound_contextvars(request_id=request_id, **span.names),
        ):
            try:
                await self._app(scope, receive, counted)
            finally:
                route = getattr(scope.get("route"), "path", "none")
                span.answered(route, status)
                log = _log.debug if route in _QUIET and status < 400 else _log.info
                log(
                    "request",
                    method=scope["method"],
                    route=route,
                    status=status,
                    bytes=sent_bytes,
                    ms=round((time.perf_counter() - begun) * 1000, 3),
                )


def _request_id(scope: Scope) -> str:
    sent = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
    return sent if _REQUEST_ID.fullmatch(sent) else new_request_id()


def new_request_id() -> str:
    """For a request that brought none."""
    return f"req_{secrets.token_hex(12)}"
