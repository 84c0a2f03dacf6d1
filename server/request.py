"""What an API asks of a worker: complete, resolved against the model, and validated again at this border."""

from __future__ import annotations

import struct
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engines.errors import RequestError
from engines.manifest import BundleManifest, Size, Task
from engines.noise import MAX_SEED
from engines.sampler import Sampler, entry_point

MAX_IMAGES = 10
"""Most images of one request, as in OpenAI's API."""

MAX_PARTIAL_IMAGES = 3

OutputFormat = Literal["png", "jpeg", "webp"]
EditMode = Literal["noise", "invert"]
"""How an edit enters the trajectory: by noising the image, or by inverting it with an encoder."""

_PNG_HEAD = struct.Struct(">8sI4sIIBB")
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _RGB = 0, 2


def media_type(kind: OutputFormat) -> str:
    return f"image/{kind}"


class Frozen(BaseModel):
    """Base of the types that cross a border: immutable, no unknown fields; bytes are base64 in JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")


class DenoiseRequest(Frozen):
    """One request for n images of one prompt. Image k is made with seed + k.

    task: text_to_image takes no image, edit an image, inpaint an image and a mask.
    image: PNG, 8-bit RGB, width × height; mask: PNG, 8-bit grey, as large, 255 = edit, 0 = keep.
    strength: how far back an edit or inpainting enters the steps, in (0, 1]; None with mode invert.
    mode, source_prompt: invert encodes the image with source_prompt in encoder_steps steps, then draws the prompt.
    output_compression: 0 … 100 as OpenAI counts it, None for the format's default;
    partial_images: previews of the clean estimate wanted on the way, per image.
    stored: the files go to the result store, and the result has their keys.
    """

    model: str
    task: Task = "text_to_image"
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
    stored: bool = False
    image: bytes | None = None
    mask: bytes | None = None
    strength: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    mode: EditMode = "noise"
    source_prompt: str | None = None
    encoder_steps: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _seeds_in_range(self) -> Self:
        if self.seed + self.n - 1 > MAX_SEED:
            raise ValueError(f"seed + n - 1 must be at most {MAX_SEED}")
        return self

    @model_validator(mode="after")
    def _fields_of_the_task(self) -> Self:
        inverts, noises = self.mode == "invert", self.task != "text_to_image" and self.mode == "noise"
        rules = (
            (self.image is not None, self.task != "text_to_image", "image", "edit and inpaint"),
            (self.mask is not None, self.task == "inpaint", "mask", "inpaint"),
            (self.strength is not None, noises, "strength", "mode noise of edit and inpaint"),
            (self.source_prompt is not None, inverts, "source_prompt", "mode invert"),
            (self.encoder_steps is not None, inverts, "encoder_steps", "mode invert"),
        )
        for given, wanted, name, where in rules:
            if given != wanted:
                raise ValueError(f"{name} belongs to {where}, and is required there")
        if inverts and self.task != "edit":
            raise ValueError("mode invert belongs to edit")
        _check_png(self.image, self.width, self.height, _RGB, "image")
        _check_png(self.mask, self.width, self.height, _GREY, "mask")
        return self

    @property
    def prompts(self) -> tuple[str, ...]:
        """Whatever it needs the condition of."""
        return (self.prompt,) if self.source_prompt is None else (self.prompt, self.source_prompt)

    @property
    def entry(self) -> int | None:
        """Grid point at which the steps are entered, None at pure noise (text-to-image) or an inverted image."""
        return None if self.strength is None else entry_point(self.steps, self.strength)

    @property
    def effective_strength(self) -> float | None:
        """The share of the steps that is run, where strength chose it."""
        return None if self.entry is None else self.entry / self.steps

    @property
    def network_steps(self) -> int:
        """Steps each image takes through the networks: those left after the entry, and those of the encoder."""
        return (self.entry or self.steps) + (self.encoder_steps or 0)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(range(self.seed, self.seed + self.n))


def find_size(manifest: BundleManifest, request: DenoiseRequest) -> Size:
    """The size of a request's images. Raises: RequestError when the bundle has it not."""
    for size in manifest.sizes:
        if (size.width, size.height) == (request.width, request.height):
            return size
    offered = ", ".join(map(str, manifest.sizes))
    raise RequestError("size", "out_of_range", f"This model does not draw in that size; it has {offered}.")


def _check_png(data: bytes | None, width: int, height: int, colour: int, name: str) -> None:
    """The header of a canonical PNG; the pixels were decoded once already, by the API that wrote it."""
    if data is None:
        return
    if len(data) < _PNG_HEAD.size:
        raise ValueError(f"{name} is not a PNG")
    signature, _, kind, wide, high, depth, found = _PNG_HEAD.unpack_from(data)
    if (signature, kind, wide, high, depth, found) != (_PNG_SIGNATURE, b"IHDR", width, height, 8, colour):
        raise ValueError(f"{name} is not an 8-bit PNG of {width}x{height} in the colours of a {name}")
