"""Every metric and its name, in Prometheus' units and suffixes. Labels never hold a prompt or a user."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from engines.bundle import Bundle
from engines.manifest import BundleManifest
from server.jobs import Backlog, JobStatus, Timing, Total
from server.request import DenoiseRequest
from server.work import Dropped, Stepped

_REQUEST_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_STAGE_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_FRACTIONS = (0.125, 0.25, 0.5, 0.75, 0.9, 1.0)

STAGES = ("condition", "steps", "decode", "encode")
FAULTS = ("condition", "steps", "decode", "engine")
"""Where a job fails by itself: in a stage, or by taking the engine process down."""

OPERATIONS = ("write", "read", "sign", "delete")
"""Calls of the result store."""


class StoreTotals(Collector):
    """Counts the store keeps itself, in the same step as the transitions they count.

    They are exact whichever process is killed when, and every process reports the same: take the largest, no sum.
    """

    def __init__(self) -> None:
        self._totals: Sequence[Total] = ()

    def read(self, totals: Sequence[Total]) -> None:
        self._totals = totals

    def collect(self) -> Iterator[CounterMetricFamily]:
        accepted = CounterMetricFamily(
            "halfstep_jobs_accepted", "Jobs the store accepted", labels=["model", "task"]
        )
        ended = CounterMetricFamily(
            "halfstep_jobs", "Jobs that ended, by status", labels=["model", "task", "status"]
        )
        missed = CounterMetricFamily(
            "halfstep_deadline_misses",
            "Jobs whose deadline passed before they were made",
            labels=["model", "task"],
        )
        for total in self._totals:
            if total.status is JobStatus.EXPIRED:
                missed.add_metric([total.model, total.task], total.count)
            if total.status is None:
                accepted.add_metric([total.model, total.task], total.count)
            else:
                ended.add_metric([total.model, total.task, total.status.value], total.count)
        yield accepted
        yield ended
        yield missed


class Metrics:
    """The metrics of one process, on a registry of their own so that tests may hold several.

    The engine reports what it did as events, so the figures are the same whether it is a thread or a process.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.process = self._gauge("halfstep_process_info", "What this process is (always 1)", ["role"])
        self._make_request_metrics()
        self._make_work_metrics()
        self._make_engine_metrics()
        ProcessCollector(registry=self.registry)

    def _make_request_metrics(self) -> None:
        count, times, gauge = self._counter, self._histogram, self._gauge
        request = ["model", "task"]
        self.accepted = count("halfstep_requests_accepted_total", "Accepted requests", request)
        ended = [*request, "size", "status"]
        self.requests = count("halfstep_requests_total", "Accepted requests by terminal status", ended)
        self.rejected = count("halfstep_requests_rejected_total", "Refused requests by reason", ["reason"])
        self.request_s = times("halfstep_request_seconds", "Acceptance to finished files", request, _REQUEST_S)
        queued = "Predicted engine seconds of accepted, unfinished work"
        self.queued_s = gauge("halfstep_queued_seconds", queued, [])
        self.model_queued_s = gauge("halfstep_model_queued_seconds", f"{queued}, of each model", ["model"])
        checked = "Images and previews by what the safety check said of them"
        self.safety_checks = count("halfstep_safety_checks_total", checked, ["model", "outcome"])
        failed = "Calls of the result store that failed"
        self.result_store_failures = count("halfstep_result_store_failures_total", failed, ["operation"])
        for operation in OPERATIONS:
            self.result_store_failures.labels(operation)  # from 0: see ``_begin``
        self.store_up = gauge(
            "halfstep_store_up", "Whether the job store answered and takes work in (1) or not (0)", []
        )
        self._totals = StoreTotals()
        self.registry.register(self._totals)

    def _make_work_metrics(self) -> None:
        count, times, gauge = self._counter, self._histogram, self._gauge
        waited = "Acceptance to the start of the condition stage"
        self.queue_wait_s = times("halfstep_queue_wait_seconds", waited, ["model", "task"], _REQUEST_S)
        stage = ["model", "stage"]
        self.stage_s = times("halfstep_stage_seconds", "Time of a request in each stage", stage, _STAGE_S)
        self.rows = gauge("halfstep_rows_in_flight", "Images in the making", [])
        self.retries = count("halfstep_retries_total", "Jobs taken back from a silent worker", [])
        self.poison = count("halfstep_poison_jobs_total", "Jobs that failed by themselves", stage)
        died = "Engine processes that died, hung or could not be started"
        self.engine_deaths = count("halfstep_engine_deaths_total", died, [])

    def _make_engine_metrics(self) -> None:
        count, times, gauge = self._counter, self._histogram, self._gauge
        self.steps = count("halfstep_denoise_steps_total", "Denoising steps of rows", ["model"])
        self.step_s = times(
            "halfstep_step_seconds", "One batched denoising step", ["model", "size", "rung"], _STAGE_S
        )
        occupancy = "Rows in a step by rows it ran"
        self.occupancy = times("halfstep_batch_occupancy_ratio", occupancy, ["model"], _FRACTIONS)
        self.padding = count("halfstep_padding_rows_total", "Rows stepped only to fill a rung", ["model"])
        cancelled = "Steps that rows which left early did not run"
        self.cancelled_steps = count("halfstep_cancelled_steps_total", cancelled, ["model"])
        self.engine = gauge("halfstep_engine_info", "Engine in use (always 1)", ["model", "engine"])
        up = "Whether the engine of this process takes jobs (1), or is being started again (0)"
        self.engine_up = gauge("halfstep_engine_up", up, [])
        version = "Version of each model in use: the sha256 of its manifest (always 1)"
        self.bundle = gauge("halfstep_bundle_info", version, ["model", "sha256"])
        preferred = "Whether the engine in use is that of the setting backend (1), or of start_backend (0)"
        self.preferred = gauge("halfstep_engine_preferred", preferred, ["model"])
        takeovers = "Engines and bundles that were to be taken up under way"
        self.takeovers = count("halfstep_takeovers_total", takeovers, ["what", "outcome"])
        for outcome in ("taken_up", "refused", "given_up"):
            self.takeovers.labels("engine", outcome)
        for outcome in ("taken_up", "refused"):
            self.takeovers.labels("bundle", outcome)
        parity = "Largest difference of a graph from what it was made from: torch, or float32 where it is int8"
        self.parity = gauge("halfstep_parity_error", parity, ["model", "graph"])
        memory = "Resident memory of the process the engine runs in; a GPU's own is not in it"
        self.memory = gauge("halfstep_device_memory_bytes", memory, ["device"])

    def is_a(self, role: Literal["serve", "api", "worker"]) -> None:
        """Note what this process is."""
        self.process.labels(role).set(1)

    def offers(self, bundles: Sequence[Bundle]) -> None:
        """Note the models that requests may ask for, in place of those before."""
        self.serves({bundle.manifest.name: bundle.sha256 for bundle in bundles})
        self.parity.clear()
        for reason in ("internal_error", "unreadable_job"):
            self.rejected.labels(reason)
        for bundle in bundles:
            self._begin(bundle.manifest)
            for graph, spec in bundle.manifest.graphs.items():
                self.parity.labels(bundle.manifest.name, graph).set(spec.parity.max_abs_error)

    def _begin(self, manifest: BundleManifest) -> None:
        """Count from 0: of a series that begins at 1, Prometheus sees no increase and no alert rings."""
        for task in manifest.tasks:
            self.accepted.labels(manifest.name, task)
            for size in manifest.sizes:
                for status in (JobStatus.SUCCEEDED, JobStatus.FAILED):
                    self.requests.labels(manifest.name, task, str(size), status.value)

    def serves(self, versions: Mapping[str, str]) -> None:
        """Note the version of each model, by the sha256 of its manifest, in place of those before."""
        self.bundle.clear()
        for model, sha256 in versions.items():
            self.bundle.labels(model, sha256).set(1)

    def uses(self, engines: Mapping[str, str], *, preferred: bool) -> None:
        """Note the engine of each model, in place of those before."""
        self.engine.clear()
        self.preferred.clear()
        for model, engine in engines.items():
            for fault in FAULTS:
                self.poison.labels(model, fault)  # from 0, as above
            for outcome in ("passed", "withheld", "failed"):
                self.safety_checks.labels(model, outcome)
            self.engine.labels(model, engine).set(1)
            self.preferred.labels(model).set(preferred)

    def watch_engine(self, pid: Callable[[], int], up: Callable[[], bool]) -> None:
        """Report at each scrape whether the engine takes jobs, and the memory of the process it runs in."""
        self.engine_up.set_function(up)
        self.memory.labels("cpu").set_function(lambda: _resident_bytes(pid()))

    def store_holds(
        self,
        backlog: Backlog,
        totals: Sequence[Total],
        of_each: Mapping[str, Backlog] | None = None,
        *,
        takes_work: bool = True,
    ) -> None:
        """Note what the store says, which is the same for all processes and survives each of them.

        of_each: the backlog of each model.
        """
        self.store_up.set(takes_work)
        self.queued_s.set(backlog.seconds)
        self.model_queued_s.clear()
        for model, own in (of_each or {}).items():
            self.model_queued_s.labels(model).set(own.seconds)
        self._totals.read(totals)

    def store_away(self) -> None:
        """What was last heard of the queue would pass for what it is now: the largest figure counts."""
        self.store_up.set(0)
        self.queued_s.set(math.nan)
        self.model_queued_s.clear()

    def engine_did(self, event: Stepped | Dropped) -> None:
        if isinstance(event, Dropped):
            self.cancelled_steps.labels(event.model).inc(event.steps)
            return
        self.steps.labels(event.model).inc(event.rows)
        self.step_s.labels(event.model, event.size, str(event.rung)).observe(event.seconds)
        self.occupancy.labels(event.model).observe(event.rows / event.rung)
        self.padding.labels(event.model).inc(event.rung - event.rows)

    def ended(self, request: DenoiseRequest, status: str, seconds: float) -> None:
        """Note how an accepted request ended; seconds: from its acceptance."""
        size = f"{request.width}x{request.height}"
        self.requests.labels(request.model, request.task, size, status).inc()
        if status == JobStatus.SUCCEEDED.value:
            self.request_s.labels(request.model, request.task).observe(seconds)

    def made(self, model: str, timing: Timing) -> None:
        """Note where the time of a finished job went."""
        for stage in STAGES:
            self.stage_s.labels(model, stage).observe(getattr(timing, stage) / 1000)

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: list[str]) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, labels: list[str], buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)


def _resident_bytes(pid: int) -> float:
    try:
        return float(psutil.Process(pid).memory_info().rss)
    except psutil.Error:  # it is being replaced
        return 0.0
