"""Bodies of the native jobs API."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from engines.manifest import Task
from engines.noise import MAX_SEED
from server.fields import EncoderSteps, GuidanceAlias, GuidanceScale, SamplerName, SourcePrompt, Steps, StepsAlias
from server.jobs import MAX_PRIORITY
from server.request import MAX_IMAGES, MAX_PARTIAL_IMAGES, EditMode, OutputFormat
from server.schemas import AnswerBody, ErrorDetail, TimingBody, is_none

MAX_DEADLINE_MS = 24 * 3600 * 1000

EventName = Literal["queued", "running", "step", "completed", "failed", "cancelled", "expired"]
"""Of an event as it is sent: where a job has succeeded, its last one is ``completed``."""

EXAMPLES = {
    "smallest": {"summary": "One image, everything else default", "value": {"prompt": "seven"}},
    "urgent": {
        "summary": "Ahead of one's other jobs, or not at all",
        "value": {"prompt": "seven", "n": 4, "seed": 1, "priority": 5, "deadline_ms": 20000},
    },
}


class JobBody(BaseModel):
    """Body of ``POST /v1/jobs``. null means left out."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: str = Field(
        description="What to draw; fields that POST /v1/images/generations has, too, are as they are there."
    )
    task: Task | None = Field(
        None, description="text_to_image when left out; edit needs image, inpaint image and mask."
    )
    image: str | None = Field(
        None, description="PNG, JPEG or WebP as base64 or a data URL, cut about its centre to the size."
    )
    mask: str | None = Field(
        None, description="As large as the image: white is drawn anew, and so is alpha 0; the rest stays."
    )
    strength: float | None = Field(
        None,
        ge=0,
        le=1,
        description="How much of the image may change, above 0: of N steps the last floor(strength · N) are run, "
        "at least one. 0.75 for an edit when left out, 1 for an inpainting.",
    )
    mode: EditMode | None = Field(
        None, description='"noise" (when left out) noises the image, "invert" encodes it; invert is for edits.'
    )
    source_prompt: SourcePrompt = None
    encoder_steps: EncoderSteps = None
    model: str | None = Field(None, description="A model id from GET /v1/models; the first one when left out.")
    n: int | None = Field(None, ge=1, le=MAX_IMAGES, description="Number of images, 1 when left out.")
    size: str | None = Field(None, description='"auto" or one of the model\'s sizes, written as "WxH" in pixels.')
    output_format: OutputFormat | None = Field(None, description='"png" when left out.')
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of jpeg and webp.")
    partial_images: int | None = Field(
        None, ge=0, le=MAX_PARTIAL_IMAGES, description="Previews of each image among the job's events."
    )
    guidance_scale: GuidanceScale = None
    guidance: GuidanceAlias = None
    steps: Steps = None
    num_inference_steps: StepsAlias = None
    seed: int | None = Field(None, ge=0, le=MAX_SEED, description="Of the first image; random when left out.")
    sampler: SamplerName = None
    negative_prompt: str | None = Field(None, description="Not supported: only the empty text.")
    response_format: Literal["url"] | None = Field(
        None, description='"url" for addresses that need no API key, where the server has a result store.'
    )
    priority: int | None = Field(
        None, ge=0, le=MAX_PRIORITY, description="Higher goes first among the jobs of one tenant; 0 when left out."
    )
    deadline_ms: int | None = Field(
        None,
        ge=1,
        le=MAX_DEADLINE_MS,
        description="From acceptance; a job that is late runs no step and has expired.",
    )
    webhook_url: str | None = Field(
        None, max_length=2048, description="Told when the job has ended; one of the addresses the server allows."
    )


class AcceptedJobBody(AnswerBody):
    """A job, and where it is looked at, followed and cancelled."""

    id: str
    object: Literal["job"] = "job"
    status: Literal["queued", "running", "succeeded", "failed", "cancelled", "expired"]
    status_url: str
    events_url: str
    cancel_url: str


class JobImageBody(AnswerBody):
    """An image of a job that succeeded. url: needs the API key, but not with response_format url."""

    index: int
    seed: int
    output_format: OutputFormat
    flagged: bool = Field(description="The safety check withheld it; it has no url.")
    url: str | None
    expires_at: int | None = Field(
        None, exclude_if=is_none, description="Of a url without API key: its end, in seconds since 1970."
    )


class JobStateBody(AcceptedJobBody):
    """A job as of now."""

    created: int = Field(description="Seconds since 1970.")
    queue_position: int | None = Field(description="Jobs expected to start before it, while it is queued.")
    step: int = Field(description="Steps done by its slowest image, of total_steps.")
    total_steps: int = Field(
        description="Steps of each image: steps, or the share of them that strength leaves, and those of encoding."
    )
    eta_ms: int | None = Field(description="Predicted until it ends, while it has not.")
    task: Task
    strength: float | None = Field(description="Of an edit: the share of the steps that is run.")
    mode: EditMode | None = Field(description="Of an edit: how it enters the steps.")
    encoder_steps: int | None = Field(description="Of mode invert: the steps in which the image is encoded.")
    model: str
    n: int
    seed: int
    guidance_scale: float
    steps: int
    sampler: str
    size: str
    output_format: OutputFormat
    priority: int
    deadline_ms: int | None
    engine: str | None
    timing: TimingBody | None
    images: list[JobImageBody]
    error: ErrorDetail | None


class JobPreviewBody(BaseModel):
    """A clean estimate on the way."""

    b64_json: str
    image_index: int
    partial_image_index: int
    output_format: OutputFormat


class JobEventBody(AnswerBody):
    """``data`` of an event. The last one, named completed, failed, cancelled or expired, has the job."""

    type: EventName
    step: int
    steps: int = Field(description="What was asked for, as in the job.")
    total_steps: int = Field(description="What step counts to, as in the job.")
    preview: JobPreviewBody | None = Field(None, exclude_if=is_none)
    job: JobStateBody | None = Field(None, exclude_if=is_none)
