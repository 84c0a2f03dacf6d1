"""What crosses the wire. Every field of a body is here; any other is refused by name."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from engines.manifest import DecoderKind, Task
from engines.noise import MAX_SEED
from server.fields import EncoderSteps, GuidanceAlias, GuidanceScale, SamplerName, SourcePrompt, Steps, StepsAlias
from server.request import MAX_IMAGES, MAX_PARTIAL_IMAGES, EditMode, OutputFormat

MAX_PROMPT_CHARS = 4000


def is_none(value: object) -> bool:
    """For fields that are left out of an answer rather than null."""
    return value is None


class AnswerBody(BaseModel):
    """Base of what is answered: the reference calls a field required where it is always there, default or not."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=True)


class GenerationBody(BaseModel):
    """Body of ``POST /v1/images/generations``. null means left out."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        json_schema_extra={
            "examples": [
                {"prompt": "seven"},
                {"prompt": "seven", "n": 4, "guidance_scale": 2.5, "steps": 4, "seed": 1},
                {"prompt": "a three", "output_format": "webp", "output_compression": 80, "stream": True},
            ]
        },
    )

    prompt: str = Field(
        description=f"What to draw: 1 to {MAX_PROMPT_CHARS} characters. GET /v1/models lists what works."
    )
    model: str | None = Field(None, description="A model id from GET /v1/models; the first one when left out.")
    n: int | None = Field(None, ge=1, le=MAX_IMAGES, description="Number of images, 1 when left out.")
    size: str | None = Field(None, description='"auto" or one of the model\'s sizes, written as "WxH" in pixels.')
    quality: Literal["auto", "standard"] | None = Field(
        None, description='Only the default: a distilled model has one quality; "steps" trades it for time.'
    )
    style: None = Field(None, description="Not supported: say it in the prompt.")
    background: Literal["auto", "opaque"] | None = Field(None, description="Images are opaque.")
    moderation: Literal["auto"] | None = Field(None, description="Only the default.")
    output_format: OutputFormat | None = Field(None, description='"png" when left out.')
    output_compression: int | None = Field(
        None, ge=0, le=100, description="Quality of jpeg (default 95) and webp (default 90), 100 the best."
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description='"b64_json" when left out; "url" where the server has a result store.'
    )
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    partial_images: int | None = Field(
        None, ge=0, le=MAX_PARTIAL_IMAGES, description="Previews of each image on the way; needs stream."
    )
    user: str | None = Field(None, max_length=512, description="Your own label; neither stored nor logged.")
    safety_identifier: str | None = Field(None, max_length=512, description='As "user", whose place it takes.')
    guidance_scale: GuidanceScale = None
    guidance: GuidanceAlias = None
    steps: Steps = None
    num_inference_steps: StepsAlias = None
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description="Image k of the response is made with seed + k; random when left out."
    )
    sampler: SamplerName = None
    negative_prompt: str | None = Field(
        None, description="Not supported: guidance was distilled against the empty prompt."
    )


class EditBody(GenerationBody):
    """Texts of the form ``POST /v1/images/edits``; its files are image and mask. An empty text means left out."""

    model_config = ConfigDict(json_schema_extra={"examples": []})

    strength: float | None = Field(
        None,
        ge=0,
        le=1,
        description="How much of the image may change, above 0: of N steps the last floor(strength · N) are run, "
        "at least one. 0.75 when left out, 1 with a mask.",
    )
    mode: EditMode | None = Field(
        None, description='"noise" (when left out) noises the image, "invert" encodes it; not both with a mask.'
    )
    source_prompt: SourcePrompt = None
    encoder_steps: EncoderSteps = None


class TimingBody(BaseModel):
    """Milliseconds of a request in each stage."""

    queue: float
    condition: float
    steps: float
    decode: float
    encode: float


class Delivered(AnswerBody):
    """How a finished file comes: inside the answer, or as an address that needs no API key, or not at all."""

    b64_json: str | None = Field(None, exclude_if=is_none, description="The file, base64-encoded.")
    url: str | None = Field(None, exclude_if=is_none, description="Where the file is, with response_format url.")
    expires_at: int | None = Field(
        None,
        exclude_if=is_none,
        description="Of the url: the end of the file and its address, in seconds since 1970.",
    )

    flagged: Literal[True] | None = Field(
        None, exclude_if=is_none, description="The safety check withheld this image."
    )


class ImageBody(Delivered):
    seed: int = Field(description="Makes this image again, alone.")


class InputTokensDetails(BaseModel):
    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """input: text tokens of the prompts, latent cells of the image that came; output: latent cells of the images.

    A mask leaves no cells out. The events of a stream add up: input is counted in that of image 0 alone.
    """

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    total_tokens: int


class ImagesResponse(AnswerBody):
    """Answer of ``POST /v1/images/generations``: OpenAI's fields, and ours beside them."""

    created: int = Field(description="Seconds since 1970.")
    data: list[ImageBody]
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    quality: Literal["auto"] = "auto"
    size: str
    usage: Usage
    model: str
    seed: int = Field(description="Of the first image.")
    guidance_scale: float
    steps: int
    sampler: str
    task: Task
    strength: float | None = Field(None, description="Of an edit: the share of the steps that was run.")
    mode: EditMode | None = Field(None, description="Of an edit or inpainting: how it entered the steps.")
    encoder_steps: int | None = Field(None, description="Of mode invert: the steps in which the image was encoded.")
    engine: str = Field(
        description="Backend, version and precision: equal requests give equal bytes on one engine."
    )
    timing: TimingBody


class PartialImageEvent(AnswerBody):
    """The clean estimate so far. image_index: k of n (ours)."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image"] = "image_generation.partial_image"
    b64_json: str
    background: Literal["opaque"] = "opaque"
    created_at: int
    output_format: OutputFormat
    partial_image_index: int
    quality: Literal["auto"] = "auto"
    size: str
    image_index: int


class CompletedEvent(Delivered):
    """The finished image, one event each. image_index: k of n (ours)."""

    type: Literal["image_generation.completed", "image_edit.completed"] = "image_generation.completed"
    background: Literal["opaque"] = "opaque"
    created_at: int
    output_format: OutputFormat
    quality: Literal["auto"] = "auto"
    size: str
    usage: Usage
    image_index: int
    model: str
    seed: int
    guidance_scale: float
    steps: int
    sampler: str
    task: Task
    strength: float | None = None
    mode: EditMode | None = None
    encoder_steps: int | None = None
    engine: str
    timing: TimingBody


class GuidanceBody(BaseModel):
    min: float
    max: float
    default: float


class StepsBody(BaseModel):
    trained: list[int]
    default: int


class ModelBody(AnswerBody):
    """A model on offer: OpenAI's fields, and what it can do."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "halfstep"
    description: str
    guidance_scale: GuidanceBody
    steps: StepsBody
    samplers: dict[int, list[str]] = Field(description="By steps.")
    sizes: list[str]
    tasks: list[str] = Field(description="What this server offers of it.")
    decoder: DecoderKind = Field(
        description="What makes pixels of its latents: its own decoder, or a tiny one distilled from that."
    )
    prompts: list[str] = Field(description="Prompts it knows; where there are too many to list, examples.")


class ModelsResponse(AnswerBody):
    object: Literal["list"] = "list"
    data: list[ModelBody]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every error, whatever its status."""

    error: ErrorDetail


Readiness = Literal["ok", "draining", "engine_down", "store_unavailable"]


class Health(BaseModel):
    status: Readiness
