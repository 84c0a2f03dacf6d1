"""A job while the engine thread has it, and the events it reports.

Events are plain values: they may cross a process border. Times are seconds of ``time.perf_counter``, which the
processes of one machine share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from engines.masks import latent_mask
from engines.pipeline import Pipeline
from engines.rows import Drawing, Floats, Row, find_encoder
from server.batching import Ticket
from server.images import read_mask
from server.jobs import JobFailure, Lease
from server.request import DenoiseRequest, find_size

PartT = TypeVar("PartT")

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
    """The engine itself, or what watched over its process, has ended; nothing more will come."""

    error: Exception


@dataclass(frozen=True)
class Stepped:
    """One batched step of ``rows`` rows of one size of image, padded to ``rung``; how long it took."""

    model: str
    size: str
    rung: int
    rows: int
    seconds: float


@dataclass(frozen=True)
class Started:
    """A job whose rows are about to step; how long it waited since its acceptance.

    engine: that makes it, as responses report it.
    """

    token: str
    queue_ms: float
    engine: str


@dataclass(frozen=True)
class Dropped:
    """Rows that left with ``steps`` steps not run: cancelled, expired or given to another worker."""

    model: str
    steps: int


@dataclass(frozen=True)
class Late:
    """A job whose deadline passed; its rows left before the next step."""

    token: str
    spans: Spans = field(default_factory=dict)


@dataclass(frozen=True)
class Died:
    """The engine process ended with these jobs in it, or another one did not start; one more is being started.

    untried: jobs that were to join it, and were not in it.
    """

    tokens: frozenset[str]
    reason: str
    untried: frozenset[str] = frozenset()


Event = Progress | Made | Failed | Crashed | Started | Stepped | Dropped | Late | Died


@dataclass(frozen=True, eq=False)
class Encoded:
    """Clean latents of a caller's image, (C, h, w); masked: without what is generated, for networks that see it."""

    known: Floats
    masked: Floats | None = None


@dataclass(eq=False)
class Image:
    """Image ``index`` of a job in the making."""

    work: Work
    index: int
    row: Row

    @property
    def key(self) -> tuple[str, str, tuple[int, ...]]:
        """What it shares its next step with."""
        return (self.work.request.model, *self.row.batch_key)

    @property
    def preview_due(self) -> bool:
        return self.row.position in self.work.preview_at


@dataclass(eq=False)
class Work:
    """A job on the engine thread.

    arrived_s, started_s: time.perf_counter when its worker claimed it, and when its condition stage began.
    """

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
        encoding = self.request.encoder_steps or 0
        drawing = self.request.network_steps - encoding
        self.preview_at = tuple(encoding + step for step in preview_steps(drawing, self.request.partial_images))
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

    def start_rows(
        self, pipeline: Pipeline, conditions: Mapping[str, Floats | Exception], image: Encoded | Exception | None
    ) -> None:
        """Make the rows. conditions: (T, D) of the request's prompts; image: the caller's.

        Raises: what one of them failed with; RequestError when the bundle lacks what the request asks for.
        """
        condition, *source = (_sound(conditions[prompt]) for prompt in self.request.prompts)
        student = pipeline.student(self.request.steps, self.request.sampler)
        size = find_size(pipeline.manifest, self.request)
        encoded = None if image is None else _sound(image)
        known = None if encoded is None else encoded.known
        masked = pipeline.blank(size) if encoded is None or encoded.masked is None else encoded.masked
        drawing = Drawing(pipeline.manifest, student, condition, self.request.guidance_scale, masked)
        mask = None if self.request.mask is None else latent_mask(read_mask(self.request.mask), size)
        for index, seed in enumerate(self.request.seeds):
            if known is None:
                row = drawing.from_noise(seed, size)
            elif self.request.strength is None:
                encoder = find_encoder(pipeline.manifest, student, self.request.encoder_steps)
                row = drawing.from_inversion(seed, known, encoder, *source)
            else:
                row = drawing.from_image(seed, known, self.request.strength, mask)
            entry = Image(self, index, row)
            self.tickets.append(Ticket(entry, entry.key, row.steps_left, self.arrived_s))

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


def _sound(part: PartT | Exception) -> PartT:
    if isinstance(part, Exception):
        raise part
    return part
