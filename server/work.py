"""A job while the engine thread has it, and the events it reports.

Events are plain values: they may cross a process border. Times are seconds of ``time.perf_counter``, which the
processes of one machine share.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engines.errors import RequestError
from engines.manifest import Size
from engines.pipeline import Floats, Pipeline, Row
from server.batching import Ticket
from server.jobs import JobFailure, Lease
from server.request import DenoiseRequest

Pixels = NDArray[np.uint8]
"""(H, W, 3) RGB."""

Spans = dict[str, tuple[float, float]]
"""When a job was first and last in each stage, what ran beside it included: stage → (begin, end)."""

Snapshot = tuple[int, int, Pixels]
"""A clean estimate on the way: (image, index, pixels)."""


@dataclass(frozen=True)
class Progress:
    """Steps done by the slowest image of a job, and new previews."""

    token: str
    step: int
    previews: tuple[Snapshot, ...] = ()


@dataclass(frozen=True)
class Made:
    """All images of a job, in order; stage times in ms."""

    token: str
    pixels: tuple[Pixels, ...]
    queue_ms: float
    condition_ms: float
    steps_ms: float
    decode_ms: float
    spans: Spans = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """A job that cannot be made. stage: where it failed."""

    token: str
    failure: JobFailure
    stage: str
    spans: Spans = field(default_factory=dict)


@dataclass(frozen=True)
class Crashed:
    """The engine thread itself has ended; nothing more will come."""

    error: Exception


@dataclass(frozen=True)
class Stepped:
    """One batched step of ``rows`` rows, padded to ``rung``; how long it took."""

    model: str
    rung: int
    rows: int
    seconds: float


@dataclass(frozen=True)
class Started:
    """A job whose rows are about to step; how long it waited since its acceptance."""

    token: str
    queue_ms: float


@dataclass(frozen=True)
class Dropped:
    """Rows that left with ``steps`` steps not run: cancelled, expired or given to another worker."""

    model: str
    steps: int


@dataclass(frozen=True)
class Late:
    """A job whose deadline passed; its rows left before the next step."""

    token: str


@dataclass(frozen=True)
class Died:
    """The engine process ended with these jobs in it; a new one is being started."""

    tokens: frozenset[str]
    reason: str


Event = Progress | Made | Failed | Crashed | Started | Stepped | Dropped | Late | Died


@dataclass(eq=False)
class Image:
    """Image ``index`` of a job in the making."""

    work: Work
    index: int
    row: Row

    @property
    def preview_due(self) -> bool:
        return self.row.position in self.work.preview_at


@dataclass(eq=False)
class Work:
    """A job on the engine thread. arrived_s, started_s: seconds of time.perf_counter."""

    lease: Lease
    arrived_s: float
    started_s: float = 0.0
    condition_ms: float = 0.0
    steps_ms: float = 0.0
    decode_ms: float = 0.0
    tickets: list[Ticket[Image]] = field(default_factory=list)
    pixels: dict[int, Pixels] = field(default_factory=dict)
    spans: Spans = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.token = self.lease.token
        self.preview_at = preview_steps(self.request.steps, self.request.partial_images)
        left_ms = self.lease.left_ms
        self.deadline_s = None if left_ms is None else self.arrived_s + left_ms / 1000

    @property
    def request(self) -> DenoiseRequest:
        return self.lease.job.request

    @property
    def step(self) -> int:
        """Steps done by the slowest image."""
        return min(ticket.row.row.position for ticket in self.tickets)

    @property
    def complete(self) -> bool:
        return len(self.pixels) == len(self.tickets)

    def start_rows(self, pipeline: Pipeline, condition: Floats) -> None:
        """Make the rows at pure noise. condition: (T, D). Raises: RequestError when the bundle lacks them."""
        size = _find_size(pipeline, self.request)
        student = pipeline.student(self.request.steps, self.request.sampler)
        for index, seed in enumerate(self.request.seeds):
            row = pipeline.start(condition, self.request.guidance_scale, seed, student, size)
            key = (self.request.model, *row.batch_key)
            self.tickets.append(Ticket(Image(self, index, row), key, row.steps_left, self.arrived_s))

    def ran(self, stage: str, begin_s: float, end_s: float) -> None:
        """Note that the job was in a stage."""
        first, _ = self.spans.get(stage, (begin_s, end_s))
        self.spans[stage] = (first, end_s)

    @property
    def queue_ms(self) -> float:
        """From acceptance to the start of the condition stage."""
        return self.lease.queued_ms + (self.started_s - self.arrived_s) * 1000

    def made(self) -> Made:
        return Made(
            token=self.token,
            pixels=tuple(self.pixels[k] for k in range(len(self.tickets))),
            queue_ms=self.queue_ms,
            condition_ms=self.condition_ms,
            steps_ms=self.steps_ms,
            decode_ms=self.decode_ms,
            spans=self.spans,
        )


def preview_steps(steps: int, partial_images: int) -> tuple[int, ...]:
    """After which steps previews are taken: spread evenly, fewer when there are too few steps."""
    wanted = {steps * (k + 1) // (partial_images + 1) for k in range(partial_images)}
    return tuple(sorted(step for step in wanted if 0 < step < steps))


def _find_size(pipeline: Pipeline, request: DenoiseRequest) -> Size:
    for size in pipeline.manifest.sizes:
        if (size.width, size.height) == (request.width, request.height):
            return size
    raise RequestError("size", "out_of_range", "This model was not trained for that size.")
