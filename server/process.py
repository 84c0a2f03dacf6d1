"""Processes that end well: on SIGTERM or SIGINT they finish what was accepted, then leave."""

from __future__ import annotations

import asyncio
import errno
import faulthandler
import ipaddress
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import structlog
import uvicorn
from starlette.types import ASGIApp

from server.app import create_app
from server.connection import ConnectionLimits, protocol
from server.errors import StartError
from server.metrics import Metrics
from server.metrics_port import MetricsPort
from server.outage import Outage
from server.renewal import Renew, Renewals
from server.service import DRAINING, ENGINE_DOWN, Service
from server.settings import Settings
from server.worker import Worker

_log = structlog.get_logger()

STDERR = 2
KEEP_ALIVE_S = 75
FLUSH_S = 3
OVERTIME_S = 4
"""A process that has not ended so long after its drain timeout is ended, saying what it was doing."""

LOOK_AT_OFFERS_S = 2.0


def own_name() -> str:
    """Names this process among all workers."""
    return f"{socket.gethostname()}-{os.getpid()}"


def check_exposure(settings: Settings) -> None:
    """Raises: StartError when anyone on a network could use this server without a key."""
    if settings.api_keys is not None or settings.allow_anonymous or _is_loopback(settings.host):
        return
    raise StartError(
        f"Listening on {settings.host} lets others in, and there are no API keys: make one with `python -m server"
        " keys new --tenant NAME --api-keys FILE` and serve with --api-keys FILE, or set"
        " HALFSTEP_ALLOW_ANONYMOUS=true where something in front checks who calls."
    )


def _is_loopback(host: str) -> bool:
    try:
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in found)


def bind(host: str, port: int, flag: str = "--port") -> socket.socket:
    """A bound socket. Raises: StartError when the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            hint = f"Port {port} on {host} is in use; stop what runs there, or choose another with {flag}."
            raise StartError(hint) from None
        reason = error.strerror or "unknown reason"
        raise StartError(
            f"Cannot listen on {host} port {port} ({reason}); choose others with --host and {flag}."
        ) from None
    return sock


def listen(sock: socket.socket) -> None:
    """Begin to hear, of a socket bound as the start began. Raises: StartError when another does by now."""
    host, port = sock.getsockname()[:2]
    try:
        sock.listen()  # uvicorn does so again, with room for more that wait
    except OSError as error:
        reason = error.strerror or "unknown reason"
        raise StartError(
            f"Cannot listen on {host} port {port} any more ({reason}): another process does, which began while this"
            " one loaded; stop it, or choose another port."
        ) from None


def url_of(sock: socket.socket) -> str:
    """Where a bound socket is reached from this machine."""
    host, port = sock.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{shown}:{port}"


class DrainingServer(uvicorn.Server):
    """uvicorn with a drain before its shutdown, begun by the first signal; a second one ends the process at once.

    Whatever does not return, a thread included, the process ends ``OVERTIME_S`` after its drain timeout, with
    status 1 and the stacks of all threads on stderr.

    ready: called with the URL when requests are welcome; renew: what SIGHUP asks for.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: Settings,
        metrics: Metrics,
        sock: socket.socket,
        ready: Callable[[str], None],
        renew: Renew | None = None,
    ) -> None:
        limits = ConnectionLimits(settings.header_timeout_s, settings.max_header_bytes, settings.body_timeout_s)
        config = uvicorn.Config(
            app,
            http=protocol(limits, lambda code: metrics.rejected.labels(code).inc()),
            proxy_headers=bool(settings.trusted_proxies),
            forwarded_allow_ips=list(settings.trusted_proxies),
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=FLUSH_S,
        )
        super().__init__(config)
        self._sock = sock
        self._drain_timeout_s = settings.drain_timeout_s
        self._drain_ends_s: float | None = None
        self._ready = ready
        self._renewals = None if renew is None else Renewals(renew, metrics)

    def hear(self) -> None:
        """Serve until told to end. Raises: StartError."""
        listen(self._sock)
        self.run(sockets=[self._sock])

    @property
    def draining(self) -> bool:
        return self._drain_ends_s is not None

    @property
    def late(self) -> bool:
        """The time for draining is over."""
        return self._drain_ends_s is not None and time.monotonic() > self._drain_ends_s

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._renewals is not None:
            self._renewals.start()
        self._ready(url_of(self._sock))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self._renewals is not None:
            await self._renewals.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.draining:
            end_at_once("ended_by_second_signal")
        faulthandler.dump_traceback_later(self._drain_timeout_s + OVERTIME_S, file=STDERR, exit=True)
        self._drain_ends_s = time.monotonic() + self._drain_timeout_s - FLUSH_S


class Process(DrainingServer):
    """The API, and in ``serve`` a worker beside it.

    While it drains, readyz is false and new work is turned away; accepted work is finished and the probes still
    answer. What is not done in time fails with 503.
    """

    def __init__(
        self,
        service: Service,
        worker: Worker | None,
        sock: socket.socket,
        ready: Callable[[str], None],
        metrics_sock: socket.socket | None = None,
        renew: Renew | None = None,
    ) -> None:
        super().__init__(create_app(service), service.settings, service.metrics, sock, ready, renew)
        self._service = service
        self._worker = worker
        self._metrics_port = MetricsPort(service, metrics_sock) if metrics_sock else None
        self._abandoned = 0

    def run_until_told(self) -> str | None:
        """Serve until a signal; one sentence on what went wrong, if anything did."""
        if self._metrics_port is not None:
            listen(self._metrics_port.sock)
        self.hear()
        if self._worker is not None and self._worker.stuck:
            end_at_once("ended_with_a_stuck_engine_call")
        if self._service.engine_down:
            return "A task of this process failed and it ended; the log above says which and why."
        if self._abandoned:
            return f"The drain timed out: {self._abandoned} accepted requests were answered 503 draining."
        return None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._tasks = [asyncio.create_task(self._hear_offers(), name="offers")]
        self._tasks.append(asyncio.create_task(self._service.webhooks.run(), name="webhooks"))
        if self._service.files is not None:
            self._tasks.append(asyncio.create_task(self._service.files.keep_swept(), name="sweep"))
        self._tasks.append(asyncio.create_task(self._service.counts.run(), name="request counts"))
        if self._worker is not None:
            self._tasks.append(asyncio.create_task(self._worker.run(), name="worker"))
        if self._metrics_port is not None:
            self._metrics_port.open()
        await super().startup(sockets)

    async def on_tick(self, counter: int) -> bool:
        for task in self._tasks:
            if task.done() and task.exception() and not self._service.engine_down:
                self._service.engine_down = True
                given_up = await self._service.abandon(ENGINE_DOWN)
                _log.error("task_failed", task=task.get_name(), abandoned=given_up, exc_info=task.exception())
                self.should_exit = True
        if self.draining:
            idle = await self._service.idle()
            if self.late and not idle:
                self._abandoned += await self._service.abandon(DRAINING)
                _log.error("drain_timed_out", abandoned=self._abandoned)
            self.should_exit |= idle or self.late
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.draining.set()
        await super().shutdown(sockets)
        if not self._service.store.outlives_process and not self.force_exit:  # nobody else will send them
            await self._service.webhooks.flush()
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)  # what they failed with was logged when it happened
        if self._metrics_port is not None:
            await self._metrics_port.close()
        await self._service.store.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._service.draining.set()

    async def _hear_offers(self) -> None:
        """What the workers have measured is what admission predicts with; and late jobs end, workers or none.

        What the store's configuration puts at risk is said at the start and after each outage.
        """
        outage, told = Outage(), False
        while True:
            try:
                self._service.costs.update(await self._service.store.offers())
                await self._service.store.expire_late()
            except OSError as error:
                outage.goes_on(str(error), call="offers")
                told = False
            else:
                outage.is_over()
                if not told and (risks := await self._service.store.risks()):
                    _log.warning("store_may_lose_jobs", because=risks)
                told = True
            await asyncio.sleep(LOOK_AT_OFFERS_S)


def end_at_once(event: str) -> NoReturn:
    """Without unwinding, which an engine call under way would hold up. Safe in a signal handler."""
    os.write(sys.stderr.fileno(), json.dumps({"event": event, "level": "error"}).encode() + b"\n")
    os._exit(1)
