"""The ASGI layer around all routes: limits of headers, foreign pages, late bodies, and what nobody caught."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.a1111_errors import error_at
from server.errors import ApiError
from server.metrics import Metrics
from server.settings import Settings

MAX_HEADERS = 100
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_log = structlog.get_logger()


class Guard:
    """settings: ``max_header_bytes``, ``body_timeout_s``, ``cors_origins``."""

    def __init__(self, app: ASGIApp, metrics: Metrics, settings: Settings) -> None:
        self._app = app
        self._metrics = metrics
        self._max_header_bytes = settings.max_header_bytes
        self._body_timeout_s = settings.body_timeout_s
        self._origins = {origin.encode() for origin in settings.cors_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        status: int | None = None

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        refusal = self._refusal(scope, headers)
        if refusal is not None:
            self._metrics.rejected.labels(refusal.code).inc()
            await respond(refusal, scope, send)
            return
        try:
            await self._app(scope, self._timely(receive), noted)
        except Exception as error:  # the log gets the reason; the client mostly has its answer by now
            _log.exception("request_failed", error=type(error).__name__)
            if status in (None, 500):  # else its answer was under way
                self._metrics.rejected.labels("internal_error").inc()
            if status is None:
                await respond(internal_error(), scope, send)

    def _timely(self, receive: Receive) -> Receive:
        """``receive`` that raises ApiError 408 once the body is late; later messages have all the time."""
        ends_s = asyncio.get_running_loop().time() + self._body_timeout_s
        reading = True

        async def timely() -> Message:
            nonlocal reading
            if not reading:
                return await receive()
            try:
                async with asyncio.timeout_at(ends_s):
                    message = await receive()
            except TimeoutError:
                reading = False
                late = f"The body did not arrive within {self._body_timeout_s:g} s."
                raise ApiError(408, "body_timeout", late, headers={"connection": "close"}) from None
            reading = bool(message.get("more_body", False))
            return message

        return timely

    def _refusal(self, scope: Scope, headers: Mapping[bytes, bytes]) -> ApiError | None:
        size = sum(len(name) + len(value) for name, value in scope["headers"])
        if size > self._max_header_bytes or len(scope["headers"]) > MAX_HEADERS:
            message = f"Headers must be at most {self._max_header_bytes} bytes and {MAX_HEADERS} in number."
            return ApiError(431, "headers_too_large", message, headers={"connection": "close"})
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            message = "Compressed request bodies are not accepted; send it as it is."
            return ApiError(415, "unsupported_encoding", message)
        if scope["method"] not in _SAFE and self._is_foreign(headers):
            message = "Pages of this origin may not call this server: cors_origins does not name it."
            return ApiError(403, "origin_not_allowed", message)
        return None

    def _is_foreign(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether a browser sent this for a page from elsewhere: a form is sent without asking first.

        Source: https://www.w3.org/TR/fetch-metadata/#sec-fetch-site-header
        """
        if headers.get(b"sec-fetch-site", b"none") in (b"none", b"same-origin"):
            return False
        return self._origins.isdisjoint((b"*", headers.get(b"origin", b"")))


def internal_error() -> ApiError:
    return ApiError(500, "internal_error", "The server failed; its log has the reason under this request id.")


async def respond(refusal: ApiError, scope: Scope, send: Send) -> None:
    """Send an error without a framework."""
    error = error_at(scope["path"], refusal)
    payload = error.payload()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(payload)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": payload})
