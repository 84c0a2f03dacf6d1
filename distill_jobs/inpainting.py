"""Images drawn into a mask: by networks that see it, and by blending the known region in at every step.

Half of a real digit is hidden and drawn anew under its own class; outside the mask the image is put back, as the
server does. Sources: Meng et al. 2023, section 4.2; Lugmayr et al. 2022 (blending, without its resampling).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from distill_jobs.classifier import DigitClassifier
from distill_jobs.columns import column_sheet
from distill_jobs.contenders import STUDENT, Contender, contenders
from distill_jobs.data.digits import CLASSES, Digits, class_condition
from distill_jobs.data.masks import half_masks, seen_channels
from distill_jobs.data.source import Condition
from distill_jobs.metrics import class_agreement
from distill_jobs.recipe import Recipe
from distill_jobs.sampling import SEED_STRIDE, Network, request_noise, sample
from distill_jobs.student import sees_masks
from engines.manifest import EvaluationRow
from engines.noise import Purpose
from engines.sampler import SamplerPlan

INPAINTING = "inpainting"
AGREEMENT, TEXT_AGREEMENT, HIDDEN_AGREEMENT = "inpaint_agreement", "text_agreement", "hidden_agreement"
BLENDED, SEEING = f"{STUDENT}, blended", f"{STUDENT} that sees the mask"
SHEET_SEEDS = 3


@dataclass(frozen=True)
class Painter:
    """One student and one way to paint into a mask with it. seeing: its network sees the mask; else blending."""

    student: Contender
    unet: UNet2DConditionModel
    seeing: bool

    @property
    def name(self) -> str:
        return SEEING if self.seeing else BLENDED

    def scale(self, recipe: Recipe) -> float:
        """The guidance it is measured at: the only one it has, else the recipe's default."""
        return self.student.scales[0] if self.student.scales else recipe.guidance.default

    def paint(
        self, recipe: Recipe, images: Tensor, masks: Tensor, labels: Tensor, scale: float, seeds: Sequence[int]
    ) -> Tensor:
        """(B, C, h, w) images, drawn as classes (B,) where masks: (B, 1, h, w) are 1 and as they were elsewhere."""
        network = self.student.network(self.unet, scale, seen_channels(images, masks) if self.seeing else None)
        plan, condition = self.student.plan(recipe), class_condition(labels)
        if self.seeing:
            drawn = sample(network, plan, condition, seeds, self.student.shape)
        else:
            drawn = blend(network, plan, condition, seeds, images, masks)
        return torch.where(masks > 0, drawn.clamp(-1, 1), images)


def blend(
    network: Network,
    plan: SamplerPlan,
    condition: Condition,
    seeds: Sequence[int],
    known: Tensor,
    masks: Tensor,
) -> Tensor:
    """(B, C, h, w) results of a plan that re-noises and blends in known: (B, C, h, w) after every step.

    masks: (B, 1, h, w), 1 where the image is generated. A pipeline's rows give the same.
    """
    x_t = noise = request_noise(seeds, tuple(known.shape[1:]))
    with torch.inference_mode():
        for position, step in enumerate(plan):
            k = step.coefficients
            added = (
                request_noise(seeds, tuple(known.shape[1:]), Purpose.STEP, position) if step.stochastic else noise
            )
            y, _ = step.apply(x_t, network(x_t, step.timestep, condition), added)
            x_t = masks * y + (1 - masks) * (k.e * known + k.f * added)
    return x_t


def painters(run_dir: Path, recipe: Recipe) -> Iterator[Painter]:
    """Every student that goes into the bundle, blending; and where its network sees the mask, seeing it too."""
    for student in (c for c in contenders(run_dir, recipe) if c.exported):
        unet = student.load()
        if sees_masks(unet):
            yield Painter(student, unet, seeing=True)
        yield Painter(student, unet, seeing=False)


def measure_inpainting(
    run_dir: Path, recipe: Recipe, classifier: DigitClassifier, digits: Digits, advance: Callable[[int], None]
) -> tuple[EvaluationRow, ...]:
    """A row a painter, means over the recipe's seeds.

    Agreement with their class of digits of which half was hidden and drawn anew, of images that the same student
    draws from text alone, and of the halves that stayed. Over the first evaluation.samples digits.
    """
    digits = digits[: recipe.evaluation.samples]
    masks = half_masks(len(digits), *digits.images.shape[2:])
    behind = seen_channels(digits.images, masks)[:, 1:]
    hidden = _agreement(classifier, behind, digits.labels)
    rows = []
    for painter in painters(run_dir, recipe):
        found: dict[str, list[float]] = {AGREEMENT: [], TEXT_AGREEMENT: []}
        for seed in recipe.evaluation.seeds:
            for name, shown in ((AGREEMENT, masks), (TEXT_AGREEMENT, torch.ones_like(masks))):
                drawn = _painted(painter, recipe, digits, shown, seed * SEED_STRIDE)
                found[name].append(_agreement(classifier, drawn, digits.labels))
                advance(len(digits) * painter.student.evaluations(painter.scale(recipe)))
        values = {**found, HIDDEN_AGREEMENT: [hidden]}
        rows.append(painter.student.row(painter.scale(recipe), values, model=painter.name))
    return tuple(rows)


def write_inpainting_sheet(file: Path, run_dir: Path, recipe: Recipe, digits: Digits) -> None:
    """A PNG: one digit of every class, without the half that is hidden, and drawn anew with several seeds."""
    first = torch.stack([(digits.labels == c).nonzero()[0, 0] for c in range(CLASSES)])
    images, labels = digits.images[first], digits.labels[first]
    masks = half_masks(CLASSES, *images.shape[2:])
    columns = {"image": images, "hidden": seen_channels(images, masks)[:, 1:]}
    for painter in painters(run_dir, recipe):
        if painter.student.steps == recipe.export.default_steps:
            how = "seen" if painter.seeing else "blend"
            for k in range(SHEET_SEEDS):
                seeds = range(k * CLASSES, (k + 1) * CLASSES)
                drawn = painter.paint(recipe, images, masks, labels, painter.scale(recipe), seeds)
                columns[f"{how} {k + 1}"] = drawn
    file.parent.mkdir(parents=True, exist_ok=True)
    column_sheet(columns).save(file)


def _painted(painter: Painter, recipe: Recipe, digits: Digits, masks: Tensor, first_seed: int) -> Tensor:
    """(n, C, h, w) all digits, in batches."""
    size, parts = recipe.evaluation.batch_size, []
    for first in range(0, len(digits), size):
        some = digits[first : first + size]
        seeds = range(first_seed + first, first_seed + first + len(some))
        mask = masks[first : first + size]
        parts.append(painter.paint(recipe, some.images, mask, some.labels, painter.scale(recipe), seeds))
    return torch.cat(parts)


def _agreement(classifier: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    with torch.inference_mode():
        _, logits = classifier(images)
    return class_agreement(logits.argmax(dim=1).numpy(), labels.numpy())
