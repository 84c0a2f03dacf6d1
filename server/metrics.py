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
        self.requests = Counter(
            "halfstep_requests_total",
            "Accepted requests by terminal status",
            ["model", "task", "size", "status"],
            registry=self.registry,
        )
        self.accepted = Counter(
            "halfstep_requests_accepted_total", "Accepted requests", ["model", "task"], registry=self.registry
        )
        self.rejected = Counter(
            "halfstep_requests_rejected_total", "Refused requests by reason", ["reason"], registry=self.registry
        )
        self.request_s = self._histogram(
            "halfstep_request_seconds", "Acceptance to finished files", ["model", "task"], _SECONDS
        )
        self.stage_s = self._histogram(
            "halfstep_stage_seconds", "Time of a request in each stage", ["model", "stage"], _SECONDS
        )
        self.steps = Counter(
            "halfstep_denoise_steps_total", "Denoising steps of rows", ["model"], registry=self.registry
        )
        self.step_s = self._histogram(
            "halfstep_step_seconds", "One batched denoising step", ["model", "rung"], _SECONDS
        )
        self.occupancy = self._histogram(
            "halfstep_batch_occupancy_ratio", "Rows in a step by rows it ran", ["model"], _FRACTIONS
        )
        self.padding = Counter(
            "halfstep_padding_rows_total", "Rows stepped only to fill a rung", ["model"], registry=self.registry
        )
        self.cancelled_steps = Counter(
            "halfstep_cancelled_steps_total",
            "Steps that cancelled rows did not run",
            ["model"],
            registry=self.registry,
        )
        self.poison = Counter(
            "halfstep_poison_rows_total", "Rows that failed alone", ["model", "stage"], registry=self.registry
        )
        self.rows = Gauge("halfstep_rows_in_flight", "Images in the making", registry=self.registry)
        self.queued_s = Gauge(
            "halfstep_queued_seconds",
            "Predicted engine seconds of accepted, unfinished work",
            registry=self.registry,
        )
        self.retries = Counter(
            "halfstep_retries_total", "Jobs taken back from a silent worker", registry=self.registry
        )
        self.engine = Gauge(
            "halfstep_engine_info", "Engine in use (always 1)", ["model", "engine"], registry=self.registry
        )

    def _histogram(self, name: str, text: str, labels: list[str], buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)
