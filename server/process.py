"""One process with API and worker: serve, and on SIGTERM or SIGINT finish what was accepted."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import FrameType
from typing import NoReturn

import structlog
import uvicorn

from engines.errors import HalfstepError
from engines.pipeline import Pipeline
from server.app import create_app
from server.service import DRAINING, ENGINE_DOWN, Service
from server.worker import Worker

_log = structlog.get_logger()

KEEP_ALIVE_S = 75
FLUSH_S = 3


class StartError(HalfstepError):
    """The process cannot start; the message says what to do."""


def bind(host: str, port: int) -> socket.socket:
    """A bound socket. Raises: StartError when the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            hint = f"Port {port} on {host} is in use; stop what runs there, or choose another with --port."
            raise StartError(hint) from None
        reason = error.strerror or "unknown reason"
        raise StartError(
            f"Cannot listen on {host} port {port} ({reason}); choose others with --host and --port."
        ) from None
    return sock


class Process(uvicorn.Server):
    """uvicorn with a worker beside it and a drain before its shutdown.

    The first SIGTERM or SIGINT turns readyz false and new work away, while accepted work is finished and the
    probes still answer; what is not done in time fails with 503. A second signal ends the process at once.
    ready: called with the URL when requests are welcome.
    """

    def __init__(
        self, service: Service, pipelines: Mapping[str, Pipeline], sock: socket.socket, ready: Callable[[str], None]
    ) -> None:
        config = uvicorn.Config(
            create_app(service),
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=FLUSH_S,
        )
        super().__init__(config)
        settings = service.settings
        self._service = service
        self._sock = sock
        self._ready = ready
        self._drain_ends_s = 0.0
        self._abandoned = 0
        self._worker = Worker(
            f"{socket.gethostname()}-{os.getpid()}",
            pipelines,
            service.store,
            service.metrics,
            max_rows=settings.max_rows,
            encode_threads=settings.encode_threads,
        )

    def run_until_told(self) -> str | None:
        """Serve until a signal; one sentence on what went wrong, if anything did."""
        self.run(sockets=[self._sock])
        if self._worker.stuck:
            _end_at_once("ended_with_a_stuck_engine_call")
        if self._service.engine_down:
            return "The worker failed and the process ended; the log above says why."
        if self._abandoned:
            return f"The drain timed out: {self._abandoned} accepted requests were answered 503 draining."
        return None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._working = asyncio.create_task(self._worker.run(), name="worker")
        await super().startup(sockets)
        host, port = self._sock.getsockname()[:2]
        shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
        self._ready(f"http://{shown}:{port}")

    async def on_tick(self, counter: int) -> bool:
        if self._working.done() and not self._service.engine_down:
            self._service.engine_down = True
            given_up = await self._service.abandon(ENGINE_DOWN)
            _log.error("worker_ended", error=repr(self._working.exception()), abandoned=given_up)
            self.should_exit = True
        if self._service.draining.is_set():
            idle = (await self._service.store.backlog()).jobs == 0
            late = time.monotonic() > self._drain_ends_s
            if late and not idle:
                self._abandoned += await self._service.abandon(DRAINING)
                _log.error("drain_timed_out", abandoned=self._abandoned)
            self.should_exit |= idle or late
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.draining.set()
        await super().shutdown(sockets)
        self._working.cancel()
        with suppress(asyncio.CancelledError, ExceptionGroup):  # the latter was logged when it happened
            await self._working

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining.is_set():
            _end_at_once("ended_by_second_signal")
        self._drain_ends_s = time.monotonic() + self._service.settings.drain_timeout_s - FLUSH_S
        self._service.draining.set()


def _end_at_once(event: str) -> NoReturn:
    """Without unwinding, which an engine call under way would hold up. Safe in a signal handler."""
    os.write(sys.stderr.fileno(), json.dumps({"event": event, "level": "error"}).encode() + b"\n")
    os._exit(1)
