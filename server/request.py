"""What an API asks of a worker: complete, resolved against the model, and validated again at this border."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engines.noise import MAX_SEED
from engines.sampler import Sampler

MAX_IMAGES = 10
"""Most images of one request, as in OpenAI's API."""

MAX_PARTIAL_IMAGES = 3

OutputFormat = Literal["png", "jpeg", "webp"]


class Frozen(BaseModel):
    """Base of the types that cross a border: immutable, no unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DenoiseRequest(Frozen):
    """One request for n images of one prompt. Image k is made with seed + k.

    output_compression: 0 … 100 as OpenAI counts it, None for the format's default;
    partial_images: previews of the clean estimate wanted on the way, per image.
    """

    model: str
    prompt: str
    n: int = Field(1, ge=1, le=MAX_IMAGES)
    seed: int = Field(ge=0, le=MAX_SEED)
    guidance_scale: float = Field(ge=1, allow_inf_nan=False)
    steps: int = Field(ge=1)
    sampler: Sampler = "deterministic"
    width: int = Field(ge=1)
    height: int = Field(ge=1)
    output_format: OutputFormat = "png"
    output_compression: int | None = Field(None, ge=0, le=100)
    partial_images: int = Field(0, ge=0, le=MAX_PARTIAL_IMAGES)

    @model_validator(mode="after")
    def _seeds_in_range(self) -> Self:
        if self.seed + self.n - 1 > MAX_SEED:
            raise ValueError(f"seed + n - 1 must be at most {MAX_SEED}")
        return self

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(range(self.seed, self.seed + self.n))
