"""The engine process: loads the models, runs them on its engine thread, and speaks to its worker over a socket.

``python -m server.engine_child SOCKET PAGE`` (two inherited descriptors) is started by ``server.engine_process``.
It ends when the other side of the socket does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from queue import SimpleQueue
from typing import Any, NoReturn

import structlog

from engines.backends.base import EngineBackend
from engines.calls import calls
from engines.cost import CostTable
from engines.errors import BundleError, HalfstepError
from engines.examples import example_inputs
from engines.pipeline import Pipeline
from server.call_watch import CallWatch, WatchedEngine
from server.costs import Offer
from server.engine_check import CheckedEngine
from server.engine_thread import EngineThread
from server.engine_wire import HEAD, events_frame, frame, sizes
from server.jobs import Lease
from server.loading import load_pipelines, spare_the_collector
from server.logs import configure_logs
from server.settings import Settings
from server.work import Crashed, Event

Load = Callable[[Settings, Mapping[str, Offer]], Mapping[str, Pipeline]]
"""Settings and what an earlier process measured → pipelines that know their costs."""

_log = structlog.get_logger()


def main(load: Load = load_pipelines) -> NoReturn:
    """Serve one worker until it closes the socket."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the worker is told, and finishes what is in here first
    link = socket.socket(fileno=int(sys.argv[1]))
    watch = CallWatch(int(sys.argv[2]))
    hello = _read(link)
    if hello is None:
        os._exit(0)
    settings = Settings(**hello["settings"])
    configure_logs(settings.log_level)
    known = {name: Offer(**body) for name, body in hello["known"].items()}
    threading.Thread(target=_end_with_worker, args=(link,), name="worker", daemon=True).start()
    try:
        pipelines = load(settings, known)
        _check_versions(pipelines, hello["versions"])
    except HalfstepError as error:
        link.sendall(frame({"refused": str(error)}))
        os._exit(1)
    for pipeline in pipelines.values():
        _watch_calls(pipeline, watch, settings.hang_s)
    loaded = {name: Offer.of(pipeline).model_dump() for name, pipeline in pipelines.items()}
    spare_the_collector()
    link.sendall(frame({"loaded": loaded}))
    _serve(link, EngineThread(pipelines))
    os._exit(0)  # without unwinding, which a call under way would hold up


def _end_with_worker(link: socket.socket) -> None:
    """While the models load, nobody else would notice for minutes that the worker is gone."""
    try:
        if link.recv(1, socket.MSG_PEEK):  # it speaks again: ``_serve`` listens
            return
    except OSError:
        pass
    os._exit(0)


def _serve(link: socket.socket, engine: EngineThread) -> None:
    outbox: SimpleQueue[list[Event]] = SimpleQueue()
    threading.Thread(target=_send, args=(link, outbox), name="events", daemon=True).start()
    engine.start(outbox.put)
    while (message := _read(link)) is not None:
        if "join" in message:
            engine.join_job(Lease.model_validate(message["join"]))
        else:
            engine.stop_job(message["stop"])


def _send(link: socket.socket, outbox: SimpleQueue[list[Event]]) -> None:
    """Beside the steps, so that none waits for its pictures to be carried away."""
    while True:
        events = outbox.get()
        for event in events:
            if isinstance(event, Crashed):
                _log.error("engine_thread_ended", error=repr(event.error))
                os._exit(1)  # the worker starts another and retries what was in here, one by one
        try:
            link.sendall(events_frame(events))
        except OSError:
            os._exit(0)


def _check_versions(pipelines: Mapping[str, Pipeline], expected: Mapping[str, str]) -> None:
    """Raises: BundleError where a bundle is not the version that was to be loaded."""
    for name, sha256 in expected.items():
        if name not in pipelines or pipelines[name].bundle.sha256 != sha256:
            raise BundleError(
                f"The bundle of {name} was replaced while it was served; SIGHUP takes up the new one."
            )


def _end_broken(error: Exception) -> None:
    """A lost device would fail every job there is: those in here are made by the next process, each alone."""
    _log.error("engine_broken", error=type(error).__name__, detail=str(error))
    os._exit(1)


def _watch_calls(pipeline: Pipeline, watch: CallWatch, floor_s: float) -> None:
    """A call is given the time of the largest size that its graph takes; an engine that fails is checked."""
    slowest: dict[str, dict[int, float]] = {}
    costs = pipeline.costs or CostTable({})
    for call in calls(pipeline.manifest):
        of_graph = slowest.setdefault(call.graph, {})
        for rung, ms in costs.ms.get(str(call), {}).items():
            of_graph[rung] = max(ms, of_graph.get(rung, 0.0))

    def wrap(graph: str, engine: EngineBackend) -> EngineBackend:
        watched = WatchedEngine(engine, slowest[graph], watch, floor_s)
        return CheckedEngine(watched, example_inputs(pipeline.manifest, pipeline.tokenizer, graph, 1), _end_broken)

    pipeline.wrap_engines(wrap)


def _read(link: socket.socket) -> dict[str, Any] | None:
    """The next message without arrays, or None when the worker is gone."""
    head = _exactly(link, HEAD.size)
    if head is None:
        return None
    body = _exactly(link, sizes(head)[0])
    if body is None:
        return None
    message: dict[str, Any] = json.loads(body)
    return message


def _exactly(link: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        try:
            part = link.recv(count - len(data))
        except OSError:
            return None
        if not part:
            return None
        data += part
    return bytes(data)


if __name__ == "__main__":
    main()
