"""An engine in a process of its own, started again when it dies or hangs, so that no request takes more with it.

The process and its worker speak over a socket pair (``engine_wire``); a hang is seen in shared memory
(``call_watch``).
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import structlog

from engines.errors import BackendError
from server.call_watch import CallWatch, shared_page
from server.costs import Offer
from server.engine import Report
from server.engine_wire import HEAD, events_from, frame, sizes
from server.jobs import Lease
from server.settings import Settings
from server.work import Crashed, Died, Event, Failed, Late, Made

START_S = 900.0
"""Most time to load and measure the models."""

TOO_LATE = (
    "The engine process was not ready within {:g} s and was ended. Build its engines ahead (python -m engines "
    "build), serve on a start_backend meanwhile, or make fewer rungs ready."
)

TOLD = {"bundles", "bundle_key", "backend", "precision", "threads", "rungs", "cache_dir", "hang_s", "log_level"}
"""Settings the process is told: what it loads and how it runs, and no secret."""

LOOK_S = 0.1
BUFFER_BYTES = 8 * 1024 * 1024
RETRY_S = (0.0, 0.0, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Pauses before starts, by how many processes in a row ended without having made a job."""

_log = structlog.get_logger()

COMMAND = (sys.executable, "-m", "server.engine_child")


class EngineProcess:
    """Started by ``spawn``; watched over between ``start`` and ``close``.

    versions: sha256 of each bundle by model name, where no other version may be loaded; command: the child, for
    tests.
    """

    def __init__(
        self, settings: Settings, command: Sequence[str] = COMMAND, *, versions: Mapping[str, str] | None = None
    ) -> None:
        self._settings = settings
        self._command = command
        self._versions = dict(versions or {})
        self._offers: dict[str, Offer] = {}
        self._joined: dict[str, Lease] = {}
        self._waiting: list[Lease] = []
        self._up = asyncio.Event()
        self._failures = 0
        self._closed = False
        self._writer: asyncio.StreamWriter | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._supervising: asyncio.Task[None] | None = None

    @property
    def offers(self) -> Mapping[str, Offer]:
        return self._offers

    @property
    def pid(self) -> int:
        return 0 if self._process is None else self._process.pid

    def spawn(self) -> None:
        """Start the process and wait until its models are ready. Raises: BackendError with what it says."""
        try:
            process, ours = self._begin()
        except OSError as error:
            raise BackendError(f"The engine process cannot be started: {error}.") from error
        if self._closed:  # meanwhile; nobody else would end it, and its loading would be waited for
            process.kill()
        known = {name: offer.model_dump() for name, offer in self._offers.items()}
        try:
            ours.settimeout(START_S)
            told = self._settings.model_dump(mode="json", include=TOLD)
            ours.sendall(frame({"settings": told, "known": known, "versions": self._versions}))
            answer = _read(ours)
        except TimeoutError:
            answer = {"refused": TOO_LATE.format(START_S)}
        except OSError:
            answer = {}
        if "loaded" not in answer:
            process.kill()
            process.wait()
            ours.close()
            raise BackendError(answer.get("refused", "The engine process ended while it loaded; the log says why."))
        self._offers = {name: Offer(**body) for name, body in answer["loaded"].items()}

    def _begin(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """The child and our end of the link. Raises: OSError without descriptors, memory or processes to be had."""
        self._link, theirs = socket.socketpair()
        with theirs, shared_page() as page:
            self._watch = CallWatch(page.fileno())
            descriptors = (theirs.fileno(), page.fileno())
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [*self._command, *map(str, descriptors)], pass_fds=descriptors, stdout=subprocess.DEVNULL
            )
        return self._process, self._link

    def start(self, report: Report) -> None:
        """Begin to listen, in the running event loop. report: called with the events of one step."""
        self._report = report
        self._supervising = asyncio.create_task(self._supervise(), name="engine process")

    @property
    def up(self) -> bool:
        return self._up.is_set()

    async def ready(self) -> None:
        """Wait until a process is up."""
        await self._up.wait()

    def join_job(self, lease: Lease) -> None:
        """Take a job in at the next step; while no process is up, as soon as one is, unless it does not start."""
        if self._up.is_set():
            self._joined[lease.token] = lease
            self._send({"join": lease.model_dump(mode="json")})
        else:
            self._waiting.append(lease)

    def stop_job(self, token: str) -> None:
        """Drop a lease's rows at the next step; no event follows."""
        self._waiting = [lease for lease in self._waiting if lease.token != token]
        if self._joined.pop(token, None) is not None:
            self._send({"stop": token})

    async def close(self) -> bool:
        """End the process, whatever it is doing, its loading included."""
        self._closed = True
        if self._supervising is not None:
            self._supervising.cancel()
            await asyncio.wait([self._supervising])
        if self._process is not None:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        return True

    async def _supervise(self) -> None:
        try:
            await self._keep_one_up()
        except Exception as error:  # nobody awaits this task: its end must not leave the worker waiting
            self._up.clear()
            _log.exception("engine_supervision_failed")
            self._report([Crashed(error)])

    async def _keep_one_up(self) -> None:
        while True:
            reason = await self._listen()
            self._failures += 1
            lost, self._joined = frozenset(self._joined), {}
            _log.error("engine_process_ended", reason=reason, jobs=len(lost))
            self._report([Died(lost, reason)])
            while not await self._spawned():
                self._failures += 1

    async def _spawned(self) -> bool:
        await asyncio.sleep(RETRY_S[min(self._failures, len(RETRY_S) - 1)])
        began = time.perf_counter()
        try:
            await asyncio.to_thread(self.spawn)
        except BackendError as error:
            _log.error("engine_process_not_started", reason=str(error))
            untried, self._waiting = frozenset(lease.token for lease in self._waiting), []
            self._report([Died(frozenset(), str(error), untried)])
            return False
        _log.info("engine_process_started", pid=self.pid, seconds=round(time.perf_counter() - began, 3))
        return True

    async def _listen(self) -> str:
        """Report what the process does until it ends; why it did."""
        process = self._process
        if process is None:
            raise RuntimeError("spawn the process before it is listened to")
        self._link.setblocking(False)
        reader, self._writer = await asyncio.open_connection(sock=self._link, limit=BUFFER_BYTES)
        self._up.set()
        waiting, self._waiting = self._waiting, []
        for lease in waiting:
            self.join_job(lease)
        watching = asyncio.create_task(self._kill_when_late(process))
        try:
            while True:
                text, arrays = sizes(await reader.readexactly(HEAD.size))
                body = json.loads(await reader.readexactly(text))
                self._pass_on(events_from(body["events"], memoryview(await reader.readexactly(arrays))))
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self._up.clear()
            hung = watching.done() and not watching.cancelled()
            watching.cancel()
            process.kill()
            self._writer.close()
        status = await asyncio.to_thread(process.wait)
        return "an engine call did not return" if hung else _ending(status)

    def _pass_on(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Made | Failed | Late):
                self._joined.pop(event.token, None)
                self._failures = 0
        self._report(events)

    async def _kill_when_late(self, process: subprocess.Popen[bytes]) -> None:
        while not self._watch.late:  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(LOOK_S)
        process.kill()

    def _send(self, message: dict[str, Any]) -> None:
        """To the child, or to nobody where it has just ended: what it was to do is then handed on."""
        if self._writer is not None and not self._writer.is_closing():
            with suppress(OSError):
                self._writer.write(frame(message))


def _read(link: socket.socket) -> dict[str, Any]:
    with link.makefile("rb") as file:
        head = file.read(HEAD.size)
        if len(head) < HEAD.size:
            return {}
        body: dict[str, Any] = json.loads(file.read(sizes(head)[0]))
        return body


def _ending(status: int) -> str:
    return f"it exited with status {status}" if status >= 0 else f"it was ended by signal {-status}"
