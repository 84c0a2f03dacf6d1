"""Images inverted to their noise and drawn again: reconstructions and edits, beside the teacher's DDIM both ways.

An image is encoded under its own class with guidance off. Decoded the same way it should come back; decoded under
another class with guidance it should become that class and keep its hand. Source: Meng et al. 2023, section 4.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from distill_jobs.classifier import DigitClassifier
from distill_jobs.contenders import STUDENT, TEACHER, Contender, latent_shape
from distill_jobs.data.digits import CLASSES, Digits, class_condition
from distill_jobs.data.source import Condition
from distill_jobs.encoders import encoders
from distill_jobs.metrics import class_agreement, paired_distance
from distill_jobs.recipe import Recipe
from distill_jobs.run_folder import RunFolder
from distill_jobs.sampling import Network, student_network
from engines.manifest import EvaluationRow, Measured
from engines.sampler import SamplerPlan, encoder_plan
from engines.schedule import NoiseSchedule

INVERTED, RECONSTRUCTION, AGREEMENT, KEPT = (
    *("inversion", "reconstruction_error"),
    *("edit_agreement", "edit_distance"),
)
SCALE_OFF = 1.0


@dataclass(frozen=True)
class Route:
    """There and back in ``steps`` steps each. encode: with guidance off; decoder, unet: what draws again."""

    model: str
    steps: int
    encode: Network
    decoder: Contender
    unet: UNet2DConditionModel

    def noise(self, recipe: Recipe, images: Tensor, labels: Tensor) -> Tensor:
        """(B, C, h, w) noise of images: (B, C, h, w) of classes (B,)."""
        plan = encoder_plan(NoiseSchedule(recipe.schedule), self.steps)
        return _walk(self.encode, plan, class_condition(labels), images)

    def draw(self, recipe: Recipe, noise: Tensor, labels: Tensor, guidance_scale: float) -> Tensor:
        """(B, C, h, w) images of classes (B,) from noise: (B, C, h, w)."""
        network = self.decoder.network(self.unet, guidance_scale)
        return _walk(network, self.decoder.plan(recipe), class_condition(labels), noise).clamp(-1, 1)


def routes(run_dir: Path, recipe: Recipe) -> Iterator[Route]:
    """For every encoder, the teacher in as many steps, then the encoder with its student; one loaded at a time."""
    folder, shape = RunFolder(run_dir), latent_shape(recipe)
    for encoder in encoders(run_dir, recipe):
        n = encoder.steps
        teacher = Contender(TEACHER, n, folder.teacher, shape)
        unet = teacher.load()
        yield Route(TEACHER, n, teacher.network(unet, SCALE_OFF), teacher, unet)
        student = Contender(STUDENT, n, folder.student(n), shape)
        yield Route(STUDENT, n, student_network(encoder.load(), 0.0), student, student.load())


def measure_inversion(
    run_dir: Path, recipe: Recipe, classifier: DigitClassifier, digits: Digits, advance: Callable[[int], None]
) -> tuple[EvaluationRow, ...]:
    """A row a route: error of reconstructions, and agreement and distance of edits, over all digits.

    Edits turn digit d into d + 1 … d + 9 in turn, at the recipe's default guidance. advance: told the evaluations.
    """
    targets = edit_targets(digits.labels)
    scale, rows = recipe.guidance.default, []
    for route in routes(run_dir, recipe):
        again, edited = [], []
        for at in torch.arange(len(digits)).split(recipe.evaluation.batch_size):
            noise = route.noise(recipe, digits.images[at], digits.labels[at])
            again.append(route.draw(recipe, noise, digits.labels[at], SCALE_OFF))
            edited.append(route.draw(recipe, noise, targets[at], scale))
            advance(len(at) * route.steps * (2 + route.decoder.computed(scale) // route.steps))
        with torch.inference_mode():
            _, logits = classifier(torch.cat(edited))
        metrics = {
            RECONSTRUCTION: paired_distance(torch.cat(again).numpy(), digits.images.numpy()),
            AGREEMENT: class_agreement(logits.argmax(dim=1).numpy(), targets.numpy()),
            KEPT: paired_distance(torch.cat(edited).numpy(), digits.images.numpy()),
        }
        rows.append(
            EvaluationRow(
                model=route.model,
                steps=route.steps,
                evaluations=2 * route.steps,
                guidance_scale=scale,
                metrics={name: Measured(mean=value, spread=0) for name, value in metrics.items()},
            )
        )
    return tuple(rows)


def edit_targets(labels: Tensor) -> Tensor:
    """(n,) another class for each of (n,) labels, all others in turn."""
    return (labels + 1 + torch.arange(len(labels)) % (CLASSES - 1)) % CLASSES


def _walk(network: Network, plan: SamplerPlan, condition: Condition, x_t: Tensor) -> Tensor:
    """Where a plan leads from x_t: (B, C, h, w)."""
    with torch.inference_mode():
        for step in plan:
            x_t, _ = step.apply(x_t, network(x_t, step.timestep, condition))
    return x_t
