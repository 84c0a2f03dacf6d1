"""Whether an engine makes what another makes: requests to ask both, and how far their images may lie apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from PIL import Image

from engines.errors import BackendError
from engines.manifest import BundleManifest, Size
from engines.rows import inverts
from server.images import write_png
from server.request import DenoiseRequest
from server.work import Pixels

MAX_LEVELS = 2
"""Most that a pixel may differ in float32, in levels of 8 bits. Backends round differently in the last digits."""

MIN_PSNR_DB = 50.0
"""Least peak signal-to-noise ratio of an image in float32."""

LOWERED_PSNR_DB = 30.0
"""The same where the network body runs in a lower precision; single pixels may differ by any number of levels."""

_EDITED_SHARE = 0.75


class UnlikeError(BackendError):
    """An engine does not make what it should."""


@dataclass(frozen=True)
class Sample:
    """A request of one image, and what the engine that is trusted made of it."""

    request: DenoiseRequest
    pixels: Pixels


def sample_of(request: DenoiseRequest, pixels: Pixels) -> Sample:
    """A sample of the first image of a request."""
    return Sample(request.model_copy(update={"n": 1, "partial_images": 0, "stored": False}), pixels)


def probe_requests(manifest: BundleManifest, prompts: Sequence[str]) -> list[DenoiseRequest]:
    """Requests of one image each that visit every student, size, task and encoder of a bundle.

    prompts: some that the model knows.
    """
    return list(_probes(manifest, prompts))


def check_like(sample: Sample, made: Pixels, precision: str) -> None:
    """Raises: UnlikeError when the image is not the sample's, within the bounds of the precision."""
    request, expected = sample.request, sample.pixels
    what = f"model {request.model}, task {request.task}, {request.steps} steps, seed {request.seed}"
    if made.shape != expected.shape:
        raise UnlikeError(f"{what}: an image of shape {made.shape}, not {expected.shape}")
    difference = np.abs(made.astype(np.float64) - expected)
    levels, psnr = float(difference.max()), _psnr_db(difference)
    most, least = (MAX_LEVELS, MIN_PSNR_DB) if precision == "float32" else (255, LOWERED_PSNR_DB)
    if levels > most or psnr < least:
        raise UnlikeError(
            f"{what}: pixels differ by up to {levels:.0f} levels ({psnr:.1f} dB); at most {most} levels and at "
            f"least {least:.0f} dB are allowed in {precision}"
        )


def _psnr_db(difference: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    error = float(np.mean(difference**2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def _probes(manifest: BundleManifest, prompts: Sequence[str]) -> Iterator[DenoiseRequest]:
    guidance, prompt = manifest.guidance, cycle(prompts)
    scale = cycle((guidance.default, guidance.max, guidance.min))
    students, sizes = manifest.students, manifest.sizes
    for seed in range(max(len(students), len(sizes))):
        student = students[seed % len(students)]
        yield DenoiseRequest(
            model=manifest.name,
            prompt=next(prompt),
            seed=seed,
            guidance_scale=next(scale),
            steps=student.steps,
            sampler=student.sampler,
            **_of_size(sizes[seed % len(sizes)]),
        )
    student = next(s for s in manifest.students if s.steps == manifest.default_steps)
    image = {
        "model": manifest.name,
        "prompt": next(prompt),
        "seed": 0,
        "guidance_scale": guidance.default,
        "steps": student.steps,
        "sampler": student.sampler,
        "image": _picture(manifest.sizes[0]),
        **_of_size(manifest.sizes[0]),
    }
    if "edit" in manifest.tasks:
        yield DenoiseRequest(**image, task="edit", strength=_EDITED_SHARE)
        drawing = [{"steps": s.steps, "sampler": s.sampler} for s in (student, *manifest.students) if inverts(s)]
        for encoder in manifest.encoders if drawing else ():
            inverting = {"mode": "invert", "source_prompt": next(prompt), "encoder_steps": encoder.steps}
            yield DenoiseRequest(**(image | drawing[0]), **inverting, task="edit")
    if "inpaint" in manifest.tasks:
        yield DenoiseRequest(**image, task="inpaint", strength=1.0, mask=_left_half(manifest.sizes[0]))


def _of_size(size: Size) -> dict[str, int]:
    return {"width": size.width, "height": size.height}


def _picture(size: Size) -> bytes:
    """Smooth in three colours: what an encoder is made for, unlike noise."""
    across, down = np.linspace(0, 255, size.width), np.linspace(0, 255, size.height)
    red, green = np.meshgrid(across, down)
    pixels = np.stack([red, green, 255 - red], axis=2).astype(np.uint8)
    return write_png(Image.fromarray(pixels))


def _left_half(size: Size) -> bytes:
    mask = np.zeros((size.height, size.width), np.uint8)
    mask[:, : size.width // 2] = 255
    return write_png(Image.fromarray(mask))
