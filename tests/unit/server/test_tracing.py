"""Traces across the queue, into an exporter in memory and over HTTP; nothing without a setting."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from server import tracing
from server.jobs import Job, Lease
from server.request import DenoiseRequest
from tests.support.live import live
from tests.support.serving import serving, until

GENERATIONS = "/v1/images/generations"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
SECRET = "seven"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What this process records, for one test."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_tracer", provider.get_tracer("test"))
    return exporter


def lease(**fields: Any) -> Lease:
    request = DenoiseRequest(
        model="m", prompt=SECRET, guidance_scale=2.0, width=64, height=64, n=1, steps=4, seed=1
    )
    return Lease(job=Job(id="j", request=request, cost_s=0.0, **fields), worker="w", attempt=2, queued_ms=5.0)


def named(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def test_a_request_is_one_trace_from_http_to_the_files(spans: InMemorySpanExporter, toy_bundle: Path) -> None:
    with live(toy_bundle) as server, server.client() as client:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        assert client.post(GENERATIONS, json={"prompt": SECRET, "n": 2}, headers=headers).status_code == 200
        client.get("/readyz")
        until(lambda: f"POST {GENERATIONS}" in named(spans), "the request's span")
    found = named(spans)
    assert set(found) == {f"POST {GENERATIONS}", "job", "condition", "steps", "decode", "encode"}
    assert {trace.format_trace_id(span.context.trace_id) for span in found.values()} == {TRACE}
    request, job = found[f"POST {GENERATIONS}"], found["job"]
    assert trace.format_span_id(request.parent.span_id) == PARENT  # type: ignore[union-attr]
    assert (request.kind, job.kind) == (SpanKind.SERVER, SpanKind.CONSUMER)
    assert job.parent.span_id == request.context.span_id  # type: ignore[union-attr]
    stages = [found[name] for name in ("condition", "steps", "decode", "encode")]
    assert {span.parent.span_id for span in stages} == {job.context.span_id}  # type: ignore[union-attr]
    assert [s.start_time for s in stages] == sorted(s.start_time or 0 for s in stages)
    assert all((job.start_time or 0) <= (s.start_time or 0) <= (s.end_time or 0) for s in stages)
    assert request.attributes == {
        "http.request.method": "POST",
        "http.route": GENERATIONS,
        "http.response.status_code": 200,
    }
    assert SECRET not in "".join(span.to_json() for span in found.values())


def test_a_failed_attempt_says_so_and_keeps_the_stages_it_reached(spans: InMemorySpanExporter) -> None:
    carried = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    tracing.record_job(lease(trace=carried), "failed", {"condition": (1.0, 2.0)})
    found = named(spans)
    assert found["job"].status.status_code is StatusCode.ERROR
    assert found["job"].attributes["halfstep.attempt"] == 2  # type: ignore[index]
    assert trace.format_trace_id(found["condition"].context.trace_id) == TRACE
    assert (found["condition"].end_time or 0) - (found["condition"].start_time or 0) == pytest.approx(1e9, abs=1e3)


def test_a_nonsensical_parent_starts_a_trace_of_its_own(spans: InMemorySpanExporter) -> None:
    with tracing.request_span("GET", [(b"traceparent", b"00-zz\xff-1")], traced=True) as span:
        assert tracing.carrier()["traceparent"].split("-")[1] == span.names["trace_id"]
    assert named(spans)["GET"].parent is None


def test_without_a_setting_nothing_is_recorded_but_the_clients_trace_is_passed_on() -> None:
    sent = f"00-{TRACE}-{PARENT}-01"
    with tracing.request_span("GET", [(b"traceparent", sent.encode())], traced=True) as span:
        assert span.names == {}
        assert tracing.carrier() == {"traceparent": sent}
    with tracing.request_span("GET", [], traced=True):
        assert tracing.carrier() == {}


@pytest.fixture
def collector() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """The traces URL of a collector of our own, and what it was sent."""
    received: list[ExportTraceServiceRequest] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1/traces", received
        server.shutdown()
        thread.join()


def test_a_process_sends_its_traces_where_it_is_told_and_logs_their_ids(
    toy_bundle: Path,
    tmp_path: Path,
    collector: tuple[str, list[ExportTraceServiceRequest]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, received = collector
    monkeypatch.setenv("HALFSTEP_TRACES_ENDPOINT", url)
    with serving([toy_bundle], log=tmp_path / "log") as server:
        httpx.post(server.url + GENERATIONS, json={"prompt": SECRET}, timeout=60).raise_for_status()
    found = [
        (resource.resource, span)
        for export in received
        for resource in export.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    assert {span.name for _, span in found} == {
        f"POST {GENERATIONS}",
        *("job", "condition", "steps", "decode", "encode"),
    }
    assert {a.value.string_value for r, _ in found for a in r.attributes if a.key == "service.name"} == {"halfstep"}
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines() if line.startswith("{")]
    assert {line["trace_id"] for line in lines if line["event"] == "request"} == {
        span.trace_id.hex() for _, span in found
    }
