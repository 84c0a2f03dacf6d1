"""What the goodput load asks for: text-to-image, edits and inpaintings of every N, strength and guidance.

A few hundred calls are drawn from a pool of distinct wishes, so that the right picture of each can be made once and
every answer held against it.
"""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Sequence
from uuid import UUID

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict

from engines.manifest import Size, Task
from engines.pipeline import Pipeline
from tests.benchmarks.load import Call, Pixels
from tests.support.open_loop import arrivals
from tests.support.pictures import file_of, photo

OURS, OURS_EDITS = "/v1/images/generations", "/v1/images/edits"
RIVALS = "/predict"
TASKS: tuple[Task, ...] = ("text_to_image", "edit", "inpaint")
POOL = 96
LEAST_STRENGTH = 0.3


class Wish(BaseModel):
    """What the load asks of every server. image, mask: PNG files in base64; white of the mask is drawn anew."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    guidance_scale: float
    steps: int
    seed: int
    strength: float | None = None
    image: str | None = None
    mask: str | None = None

    @property
    def task(self) -> Task:
        if self.image is None:
            return "text_to_image"
        return "edit" if self.mask is None else "inpaint"

    def known(self) -> Pixels:
        """(H, W, 3) of the image."""
        return _read(self.image, "RGB")

    def generated(self) -> NDArray[np.bool_]:
        """(H, W) of the mask, True where the image is drawn anew."""
        return _read(self.mask, "L") >= 128


def draw_pool(pipeline: Pipeline, seed: int, count: int = POOL) -> list[Wish]:
    """Distinct wishes: every task and every N equally often, guidance from the whole range."""
    chosen = random.Random(seed)
    manifest, prompts = pipeline.manifest, pipeline.tokenizer.known()
    steps = sorted({student.steps for student in manifest.students})
    pairs = [(task, n) for task in TASKS if task in manifest.tasks for n in steps]
    wishes = []
    for k in range(count):
        task, n = pairs[k % len(pairs)]
        picture = {} if task == "text_to_image" else _picture(chosen, manifest.sizes[0], task)
        wishes.append(
            Wish(
                prompt=chosen.choice(prompts),
                guidance_scale=round(chosen.uniform(manifest.guidance.min, manifest.guidance.max), 2),
                steps=n,
                seed=chosen.randrange(2**32),
                strength=None if task == "text_to_image" else round(chosen.uniform(LEAST_STRENGTH, 1), 2),
                **picture,
            )
        )
    return wishes


def draw_calls(
    pool: Sequence[tuple[Wish, Pixels]], path: str, rate: float, seconds: float, seed: int
) -> list[Call]:
    """A load of the pool's wishes, in the words of the server behind ``path``. pool: with their right pictures."""
    chosen = random.Random(seed)
    calls = []
    for at_s in arrivals(rate, seconds, seed):
        wish, expected = chosen.choice(pool)
        calls.append(Call(at_s, *(_to_ours(wish) if path == OURS else _to_rivals(wish)), expected))
    return calls


def answer(pixels: Pixels) -> dict[str, str]:
    """What rivals send: a PNG, compressed as quickly as this project's server does."""
    return {"image": base64.b64encode(file_of(Image.fromarray(pixels), compress_level=1)).decode()}


def _picture(chosen: random.Random, size: Size, task: Task) -> dict[str, str]:
    fields = {"image": _base64(photo((size.width, size.height), seed=chosen.randrange(2**16)))}
    if task == "inpaint":
        mask = Image.new("L", (size.width, size.height))
        left, top = chosen.randrange(size.width // 2), chosen.randrange(size.height // 2)
        mask.paste(255, (left, top, left + size.width // 2, top + size.height // 2))
        fields["mask"] = _base64(mask)
    return fields


def _to_rivals(wish: Wish) -> tuple[str, str, bytes]:
    """(path, content type, body)."""
    return RIVALS, "application/json", wish.model_dump_json().encode()


def _to_ours(wish: Wish) -> tuple[str, str, bytes]:
    """(path, content type, body): OpenAI's API, whose mask is drawn anew where it is transparent."""
    if wish.image is None:
        return OURS, "application/json", wish.model_dump_json(exclude_none=True).encode()
    files = {"image": base64.b64decode(wish.image)}
    if wish.mask is not None:
        generated = wish.generated()
        alpha = np.where(generated, 0, 255).astype(np.uint8)
        files["mask"] = file_of(Image.fromarray(np.dstack([wish.known(), alpha])))
    fields = wish.model_dump(include={"prompt", "guidance_scale", "steps", "seed", "strength"})
    return OURS_EDITS, *_multipart(fields, files)


def _multipart(fields: dict[str, object], files: dict[str, bytes]) -> tuple[str, bytes]:
    boundary = UUID(int=0).hex
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    for name, data in files.items():
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}.png"\r\n'
        parts.append(head.encode() + b"Content-Type: image/png\r\n\r\n" + data + b"\r\n")
    return f"multipart/form-data; boundary={boundary}", b"".join(parts) + f"--{boundary}--\r\n".encode()


def _read(file: str | None, mode: str) -> Pixels:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(file or ""))).convert(mode))


def _base64(image: Image.Image) -> str:
    return base64.b64encode(file_of(image)).decode()
