"""Traces that cross the queue: the span of a request, and those of its job's stages in whichever worker ran it.

The context travels with the job in W3C form. Without ``start_tracing`` nothing is recorded and nothing is sent.
Spans never hold a prompt, a user, a header or an address.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.jobs import Lease

SERVICE = "halfstep"
EXPORT_TIMEOUT_S = 5.0

_tracer = trace.get_tracer(SERVICE)
_w3c = TraceContextTextMapPropagator()

Headers = Iterable[tuple[bytes, bytes]]
Spans = Mapping[str, tuple[float, float]]
"""Stage → (begin, end) in seconds of ``time.perf_counter``."""


def start_tracing(endpoint: str, role: str) -> None:
    """Send the spans of this process with OTLP over HTTP. endpoint: the whole URL; role: serve, api or worker.

    The provider is ours alone: as the process-wide one it would collect the spans of libraries, too.
    """
    global _tracer  # noqa: PLW0603 - set once, before anything is served
    # The exporter is imported only here: most processes send no traces.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    name = SERVICE if role == "serve" else f"{SERVICE}-{role}"
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    exporter = OTLPSpanExporter(endpoint, timeout=EXPORT_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = provider.get_tracer(SERVICE)


class RequestSpan:
    """The span of one HTTP request, named once its route is known."""

    def __init__(self, span: trace.Span, method: str) -> None:
        self._span = span
        self._method = method

    @property
    def names(self) -> dict[str, str]:
        """The ``trace_id`` that log lines name; empty while nothing is recorded."""
        if not self._span.is_recording():
            return {}
        return {"trace_id": trace.format_trace_id(self._span.get_span_context().trace_id)}

    def answered(self, route: str, status: int) -> None:
        self._span.update_name(f"{self._method} {route}")
        self._span.set_attributes({"http.route": route, "http.response.status_code": status})
        if status >= 500:
            self._span.set_status(Status(StatusCode.ERROR))


@contextmanager
def request_span(method: str, headers: Headers, *, traced: bool) -> Iterator[RequestSpan]:
    """The span of a request, in the trace its ``traceparent`` header names, if any. traced: False records none."""
    if not traced:
        yield RequestSpan(trace.INVALID_SPAN, method)
        return
    sent = next((value for name, value in headers if name == b"traceparent"), b"").decode("latin-1")
    with _tracer.start_as_current_span(
        method,
        _w3c.extract({"traceparent": sent}),
        kind=SpanKind.SERVER,
        attributes={"http.request.method": method},
        record_exception=False,
    ) as span:
        yield RequestSpan(span, method)


def carrier() -> dict[str, str]:
    """The context of the span under way, for a job to carry; empty without one."""
    carried: dict[str, str] = {}
    _w3c.inject(carried)
    return {name: value for name, value in carried.items() if name == "traceparent"}


def record_job(lease: Lease, outcome: str, spans: Spans) -> None:
    """The span of one attempt at a job, and one below it for each stage. outcome: its status, or ``lost``."""
    now, wall_ns = time.perf_counter(), time.time_ns()

    def at_ns(seconds: float) -> int:
        return wall_ns - int((now - seconds) * 1e9)

    request = lease.job.request
    begun = min((begin for begin, _ in spans.values()), default=now)
    job = _tracer.start_span(
        "job",
        _w3c.extract(lease.job.trace),
        kind=SpanKind.CONSUMER,
        start_time=at_ns(begun),
        attributes={
            "halfstep.job": lease.job.id,
            "halfstep.attempt": lease.attempt,
            "halfstep.model": request.model,
            "halfstep.task": request.task,
            "halfstep.images": request.n,
            "halfstep.steps": request.steps,
            "halfstep.queue_ms": lease.queued_ms,
            "halfstep.outcome": outcome,
        },
    )
    below = trace.set_span_in_context(job)
    for stage, (begin, end) in spans.items():
        _tracer.start_span(stage, below, start_time=at_ns(begin)).end(at_ns(end))
    if outcome in ("failed", "lost"):
        job.set_status(Status(StatusCode.ERROR))
    job.end(at_ns(now))
