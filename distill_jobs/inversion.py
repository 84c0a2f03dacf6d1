"""Images inverted to their noise and drawn again: reconstructions and edits, beside the teacher's DDIM both ways.

An image is encoded under its own class with guidance off. Decoded the same way it should come back; decoded under
another class with guidance it should become that class and keep its hand. Source: Meng et al. 2023, section 4.3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from distill_jobs.classifier import DigitClassifier
from distill_jobs.columns import column_sheet
from distill_jobs.contenders import STUDENT, TEACHER, Contender, guided_where_applied, latent_shape
from distill_jobs.data.digits import CLASSES, Digits, class_condition
from distill_jobs.data.source import Condition
from distill_jobs.encoders import Encoder, encoders
from distill_jobs.metrics import class_agreement, paired_distance
from distill_jobs.recipe import Recipe
from distill_jobs.run_folder import RunFolder
from distill_jobs.sampling import Network
from engines.manifest import EvaluationRow, Measured
from engines.sampler import SamplerPlan, encoder_plan
from engines.schedule import NoiseSchedule

INVERSION = "inversion"
RECONSTRUCTION, AGREEMENT, CHANGE = "reconstruction_error", "edit_agreement", "edit_distance"
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
        return walk(self.encode, plan, class_condition(labels), images)

    def draw(self, recipe: Recipe, noise: Tensor, labels: Tensor, guidance_scale: float) -> Tensor:
        """(B, C, h, w) images of classes (B,) from noise: (B, C, h, w)."""
        network = self.decoder.network(self.unet, guidance_scale)
        return walk(network, self.decoder.plan(recipe), class_condition(labels), noise).clamp(-1, 1)


def teacher_route(run_dir: Path, recipe: Recipe, steps: int) -> Route:
    """DDIM both ways."""
    own = Contender(TEACHER, steps, RunFolder(run_dir).teacher, latent_shape(recipe))
    teacher = guided_where_applied(own, recipe)
    unet = teacher.load()
    return Route(TEACHER, steps, teacher.network(unet, SCALE_OFF), teacher, unet)


def student_route(run_dir: Path, recipe: Recipe, encoder: Encoder) -> Route:
    """An encoder, and the student of as many steps."""
    student = Contender(STUDENT, encoder.steps, RunFolder(run_dir).student(encoder.steps), latent_shape(recipe))
    encode = student.network(encoder.load(), SCALE_OFF)
    return Route(STUDENT, encoder.steps, encode, student, student.load())


def measure_inversion(
    run_dir: Path, recipe: Recipe, classifier: DigitClassifier, digits: Digits, advance: Callable[[int], None]
) -> tuple[EvaluationRow, ...]:
    """A row a route: error of reconstructions, and agreement and distance of edits.

    Over the first evaluation.samples digits, which are all with the default. Edits turn digit d into d + 1 … d + 9
    in turn, at the recipe's default guidance. advance: told the evaluations.
    """
    rows, digits = [], digits[: recipe.evaluation.samples]
    for encoder in encoders(run_dir, recipe):
        both = (teacher_route(run_dir, recipe, encoder.steps), student_route(run_dir, recipe, encoder))
        rows += [_row(route, recipe, classifier, digits, advance) for route in both]
    return tuple(rows)


def _row(
    route: Route, recipe: Recipe, classifier: DigitClassifier, digits: Digits, advance: Callable[[int], None]
) -> EvaluationRow:
    targets, scale = edit_targets(digits.labels), recipe.guidance.default
    again, edited = [], []
    for first in range(0, len(digits), recipe.evaluation.batch_size):
        at = slice(first, first + recipe.evaluation.batch_size)
        noise = route.noise(recipe, digits.images[at], digits.labels[at])
        again.append(route.draw(recipe, noise, digits.labels[at], SCALE_OFF))
        edited.append(route.draw(recipe, noise, targets[at], scale))
        advance(len(noise) * (2 * route.steps + route.decoder.evaluations(scale)))
    with torch.inference_mode():
        _, logits = classifier(torch.cat(edited))
    metrics = {
        RECONSTRUCTION: paired_distance(torch.cat(again).numpy(), digits.images.numpy()),
        AGREEMENT: class_agreement(logits.argmax(dim=1).numpy(), targets.numpy()),
        CHANGE: paired_distance(torch.cat(edited).numpy(), digits.images.numpy()),
    }
    return EvaluationRow(
        model=route.model,
        steps=route.steps,
        evaluations=2 * route.steps,
        guidance_scale=scale,
        metrics={name: Measured(mean=value, spread=0) for name, value in metrics.items()},
    )


def write_edit_sheet(file: Path, run_dir: Path, recipe: Recipe, digits: Digits) -> None:
    """A PNG: one digit of every class, drawn again, and as every class by the encoder of most steps."""
    route = student_route(run_dir, recipe, encoders(run_dir, recipe)[0])
    first = torch.stack([(digits.labels == c).nonzero()[0, 0] for c in range(CLASSES)])
    images, labels = digits.images[first], digits.labels[first]
    noise = route.noise(recipe, images, labels)
    columns = {"image": images, "again": route.draw(recipe, noise, labels, SCALE_OFF)}
    for target in range(CLASSES):
        wanted = torch.full_like(labels, target)
        columns[str(target)] = route.draw(recipe, noise, wanted, recipe.guidance.default)
    file.parent.mkdir(parents=True, exist_ok=True)
    column_sheet(columns).save(file)


def edit_targets(labels: Tensor) -> Tensor:
    """(n,) another class for each of (n,) labels, all others in turn."""
    return (labels + 1 + torch.arange(len(labels)) % (CLASSES - 1)) % CLASSES


def walk(network: Network, plan: SamplerPlan, condition: Condition, x_t: Tensor) -> Tensor:
    """Where a plan leads from x_t: (B, C, h, w)."""
    with torch.inference_mode():
        for step in plan:
            x_t, _ = step.apply(x_t, network(x_t, step.timestep, condition))
    return x_t
