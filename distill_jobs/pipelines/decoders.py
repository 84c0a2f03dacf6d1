"""The tiny decoder beside the teacher's autoencoder: what the same latents look like decoded by either."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from distill_jobs.contenders import STUDENT, Contender
from distill_jobs.gates import FRECHET, Gate
from distill_jobs.pipelines.drawing import LatentSampler
from distill_jobs.pipelines.glyphs import TOP_1
from distill_jobs.pipelines.tiny_decoder import Decoder
from engines.manifest import EvaluationRow

DECODER = "decoder"
PSNR, ERROR = "decoder_psnr", "decoder_error"
DATA_PSNR = "decoder_data_psnr"
"""Of the pictures of the data, given back from their latents."""

WITH_TINY = "{}, tiny decoder"
DECODED_ROWS = 64
"""At most, of latents that are decoded at once: fewer where ``evaluation.batch_size`` is smaller."""

LEAST_PSNR, MOST_LOST_DB, MOST_OF_DISTANCE, LEAST_OF_TOP_1 = 25.0, 0.5, 1.1, 0.98
PEAK = 2.0
"""Between black and white in -1 … 1."""


def decoded(decoder: Decoder, latents: Tensor, device: torch.device, batch_size: int) -> Tensor:
    """(n, 3, H, W) pictures on the CPU, of latents: (n, C, h, w), at most ``batch_size`` of them at a time."""
    parts = torch.split(latents, min(DECODED_ROWS, batch_size))
    with torch.inference_mode():
        return torch.cat([decoder.decode(part.to(device)).cpu() for part in parts])


def measure_decoders(
    sampler: LatentSampler,
    everyone: Sequence[Contender],
    full: Decoder,
    tiny: Decoder,
    known: tuple[Tensor, Tensor],
    judged: Callable[[Tensor], Mapping[str, float]] | None,
) -> tuple[EvaluationRow, ...]:
    """Two rows, one a decoder, for the finest teacher and for the student of the default step count.

    known: pictures of the data, (N, 3, H, W), and their latents, (N, C, h, w). judged: further measures of the
    pictures of the sampler's prompts, if there are any.
    """
    rows, recipe = [], sampler.recipe
    default, seeds = recipe.served.default, recipe.evaluation.seeds

    def decode(decoder: Decoder, latents: Tensor) -> Tensor:
        return decoded(decoder, latents, sampler.device, recipe.evaluation.batch_size)

    given_back = {decoder: compared(decode(decoder, known[1]), known[0])[PSNR] for decoder in (full, tiny)}
    students = [c for c in everyone if c.exported and c.steps == recipe.export.default_steps]
    for contender in (everyone[0], *students[:1]):
        found: dict[str, list[dict[str, float]]] = {}
        for seed in seeds:
            latents = sampler.draw(contender, default, seed)
            wanted = decode(full, latents)
            for title, decoder in ((contender.title, full), (WITH_TINY.format(contender.title), tiny)):
                pictures = wanted if decoder is full else decode(decoder, latents)
                of_glyphs = {} if judged is None else judged(pictures)
                measures = {**compared(pictures, wanted), DATA_PSNR: given_back[decoder], **of_glyphs}
                found.setdefault(title, []).append(measures)
        for title, each in found.items():
            values = {name: [measures[name] for measures in each] for name in each[0]}
            rows.append(contender.row(default, values, model=title))
    return tuple(rows)


def compared(pictures: Tensor, wanted: Tensor) -> dict[str, float]:
    """Both as they are shown, within -1 … 1. No PSNR where they are equal."""
    shown, reference = pictures.clamp(-1, 1), wanted.clamp(-1, 1)
    wrong = float((shown - reference).square().mean())
    error = {ERROR: math.sqrt(wrong / max(float(reference.square().mean()), 1e-12))}
    return {**error, PSNR: 10 * math.log10(PEAK**2 / wrong)} if wrong else error


def decoder_gates(rows: Sequence[EvaluationRow], target: Literal["teacher", "data"]) -> Iterator[Gate]:
    """What the tiny decoder must keep of the student's pictures. target: what it was trained to give."""
    by_model = {row.model: row.metrics for row in rows}
    full, tiny = by_model.get(STUDENT), by_model.get(WITH_TINY.format(STUDENT))
    if full is None or tiny is None:
        return
    if target == "data":
        lost = full[DATA_PSNR].mean - tiny[DATA_PSNR].mean
        yield Gate(
            name="tiny decoder, PSNR of the data below the autoencoder's, dB", value=lost, limit=MOST_LOST_DB
        )
    elif PSNR in tiny:
        yield Gate(name="tiny decoder, PSNR", value=tiny[PSNR].mean, limit=LEAST_PSNR, at_least=True)
    if FRECHET in tiny:
        ratio = tiny[FRECHET].mean / max(full[FRECHET].mean, 1e-12)
        yield Gate(name="tiny decoder, Fréchet distance / autoencoder's", value=ratio, limit=MOST_OF_DISTANCE)
    if TOP_1 in tiny:
        ratio = tiny[TOP_1].mean / max(full[TOP_1].mean, 1e-12)
        named = "tiny decoder, nearest glyph is the prompted one / with the autoencoder"
        yield Gate(name=named, value=ratio, limit=LEAST_OF_TOP_1, at_least=True)
