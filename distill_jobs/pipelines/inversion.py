"""Latents inverted to their noise and drawn again: encoders beside the teacher's DDIM both ways.

Each image is encoded under its own caption with guidance off, and decoded the same way in as many steps.
Source: Meng et al. 2023, section 4.3.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from distill_jobs.contenders import STUDENT, TEACHER, Contender, latent_shape
from distill_jobs.encoders import encoders
from distill_jobs.inversion import RECONSTRUCTION, SCALE_OFF
from distill_jobs.pipelines.drawing import LatentSampler
from distill_jobs.run_folder import RunFolder
from engines.manifest import EvaluationRow, Measured

LATENT_INVERSION = "latent_inversion"


def measure_latent_inversion(
    run_dir: Path, sampler: LatentSampler, known: Tensor, advance: Callable[[], None]
) -> tuple[EvaluationRow, ...]:
    """A row of the teacher and one of the students for each encoder. known: (n, C, h, w) latents of the images."""
    rows, folder, shape = [], RunFolder(run_dir), latent_shape(sampler.recipe)
    sampler.networks.drop()  # two others are read here
    for encoder in encoders(run_dir, sampler.recipe):
        teacher = Contender(TEACHER, encoder.steps, folder.teacher, shape)
        student = Contender(STUDENT, encoder.steps, folder.student(encoder.steps), shape)
        for decoder in (teacher, student):
            unet = decoder.load().to(sampler.device)
            inverter = unet if decoder is teacher else encoder.load().to(sampler.device)
            again = sampler.there_and_back(decoder, unet, inverter, known)
            error = float((again - known).square().mean().sqrt())
            rows.append(
                EvaluationRow(
                    model=decoder.title,
                    steps=decoder.steps,
                    evaluations=2 * decoder.steps,
                    guidance_scale=SCALE_OFF,
                    metrics={RECONSTRUCTION: Measured.of([error])},
                )
            )
            advance()
    return tuple(rows)
