"""Every metric and its name. Labels never hold a prompt or a user."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_FRACTIONS = (0.125, 0.25, 0.5, 0.75, 0.9, 1.0)

STAGES = ("queue", "condition", "steps", "decode", "encode")


class Metrics:
    """The metrics of one process, on a registry of their own so that tests may hold several."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._make_request_metrics()
        self._make_engine_metrics()

    def _make_request_metrics(self) -> None:
        count, times = self._counter, self._histogram
        of_request = ["model", "task"]
        self.accepted = count("halfstep_requests_accepted_total", "Accepted requests", of_request)
        ended = [*of_request, "size", "status"]
        self.requests = count("halfstep_requests_total", "Accepted requests by terminal status", ended)
        self.rejected = count("halfstep_requests_rejected_total", "Refused requests by reason", ["reason"])
        self.retries = count("halfstep_retries_total", "Jobs taken back from a silent worker", [])
        self.request_s = times("halfstep_request_seconds", "Acceptance to finished files", of_request, _SECONDS)
        stage = ["model", "stage"]
        self.stage_s = times("halfstep_stage_seconds", "Time of a request in each stage", stage, _SECONDS)
        queued = "Predicted engine seconds of accepted, unfinished work"
        self.queued_s = Gauge("halfstep_queued_seconds", queued, registry=self.registry)

    def _make_engine_metrics(self) -> None:
        count, times = self._counter, self._histogram
        self.steps = count("halfstep_denoise_steps_total", "Denoising steps of rows", ["model"])
        self.step_s = times("halfstep_step_seconds", "One batched denoising step", ["model", "rung"], _SECONDS)
        occupancy = "Rows in a step by rows it ran"
        self.occupancy = times("halfstep_batch_occupancy_ratio", occupancy, ["model"], _FRACTIONS)
        self.padding = count("halfstep_padding_rows_total", "Rows stepped only to fill a rung", ["model"])
        cancelled = "Steps that cancelled rows did not run"
        self.cancelled_steps = count("halfstep_cancelled_steps_total", cancelled, ["model"])
        self.poison = count("halfstep_poison_rows_total", "Rows that failed alone", ["model", "stage"])
        self.rows = Gauge("halfstep_rows_in_flight", "Images in the making", registry=self.registry)
        labels = ["model", "engine"]
        self.engine = Gauge("halfstep_engine_info", "Engine in use (always 1)", labels, registry=self.registry)

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, labels: list[str], buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)
