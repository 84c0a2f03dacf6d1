"""One HTTP/1.1 connection: uvicorn's, with the deadlines and the header limit that it lacks."""

from __future__ import annotations

from asyncio import TimerHandle, Transport
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.api.access import new_request_id
from server.errors import ApiError

LINGER_S = 2.0
"""Time a client has to take an early answer before the rest of what it sends is cut off."""

_log = structlog.get_logger()


@dataclass(frozen=True)
class ConnectionLimits:
    """header_s: from the first chance to send a request to its last header; stall_s: without a byte taken."""

    header_s: float
    header_bytes: int
    stall_s: float


class Connection(HttpToolsProtocol):
    """Refuses slow and endless headers, and drops clients that take no more of an answer.

    The guard has the deadline of the body, which ends in an answer of the application. refused: told the
    code of every refusal made here.
    """

    def __init__(self, *args: Any, limits: ConnectionLimits, refused: Callable[[str], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._told = refused
        self._deadline: TimerHandle | None = None
        self._stalled: TimerHandle | None = None
        self._in_headers = True
        self._in_body = False
        self._header_bytes = 0
        self._silent = True
        self._refused = False

    # ---- what asyncio calls

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._stalled is not None:
            self._stalled.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._silent = False
        if self._deadline is None and not self._in_body and (self.cycle is None or self.cycle.response_complete):
            self._expect_headers()  # a blank line starts no message, yet it ends uvicorn's keep-alive timer
        if self._in_headers:
            self._header_bytes += len(data)
        super().data_received(data)
        if self._in_headers and self._header_bytes > self._limits.header_bytes:
            message = f"Headers must be at most {self._limits.header_bytes} bytes."
            self._refuse(ApiError(431, "headers_too_large", message))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self._limits.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
        super().resume_writing()

    # ---- what the parser calls

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_headers()

    def on_headers_complete(self) -> None:
        self._in_headers, self._in_body = False, True
        self._disarm()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_body = False
        self._disarm()
        super().on_message_complete()

    # ---- what uvicorn calls

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_body:  # answered before all of the body came
            self._arm(LINGER_S, self.transport.close)

    # ---- ours

    def _expect_headers(self) -> None:
        if not self._in_headers:
            self._header_bytes = 0
        self._in_headers = True
        self._arm(self._limits.header_s, self._headers_late)

    def _headers_late(self) -> None:
        if self.flow.read_paused or (self.cycle is not None and not self.cycle.response_complete):
            self._arm(self._limits.header_s, self._headers_late)  # an earlier request is still being answered
            return
        if self._silent:  # a connection opened ahead of need asked nothing
            self.transport.close()
            return
        message = f"The headers did not arrive within {self._limits.header_s:g} s."
        self._refuse(ApiError(408, "header_timeout", message))

    def _refuse(self, error: ApiError) -> None:
        """Answer, and go on taking bytes for a while: closing on unread ones would destroy the answer."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._told(error.code)
        payload = error.payload()
        request_id = new_request_id()
        _log.info("request_refused", request_id=request_id, status=error.status, code=error.code)
        head = (
            f"content-type: application/json\r\nx-request-id: {request_id}\r\nconnection: close\r\n"
            f"content-length: {len(payload)}\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[error.status] + head.encode() + payload)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._arm(LINGER_S, self.transport.close)

    def _arm(self, delay_s: float, then: Callable[[], None]) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(delay_s, then)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def protocol(limits: ConnectionLimits, refused: Callable[[str], None]) -> type[HttpToolsProtocol]:
    """The class uvicorn is to make its connections of."""

    def make(*args: Any, **kwargs: Any) -> Connection:
        return Connection(*args, limits=limits, refused=refused, **kwargs)

    return cast("type[HttpToolsProtocol]", make)
