"""Latent inpainting, measured: what is drawn where a mask hides the image, and what becomes of the rest.

Half of each image is hidden and drawn anew under its own caption, by networks that see the mask and by students
that blend what is known in at every step. Latents are compared, before known pixels are put back over the image.
Source: Meng et al. 2023, section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill_jobs.contenders import TEACHER, Contender
from distill_jobs.data.masked_latents import MaskedLatentSource
from distill_jobs.data.masks import half_masks
from distill_jobs.draws import Draws
from distill_jobs.inpainting import BLENDED, SEEING
from distill_jobs.pipelines.drawing import LatentSampler
from engines.manifest import EvaluationRow

LATENT_INPAINTING = "latent_inpainting"
INSIDE, OUTSIDE = "masked_distance", "known_distance"


@dataclass(frozen=True)
class Scene:
    """Images behind masks, n of them.

    known: (n, C, h, w) their latents; masks: (n, 1, h, w), 1 where the image is generated; seen: (n, 1 + C, h, w)
    what networks see of them.
    """

    known: Tensor
    masks: Tensor
    seen: Tensor

    @classmethod
    def of(cls, source: MaskedLatentSource, draws: Draws, samples: int, size: int) -> Scene:
        """The first ``samples`` images that ``source`` gives in batches of ``size``, each without one half."""
        known, seen = [], []
        for update in range(-(-samples // size)):
            pixels = source.pixels(draws, update, size)
            known.append(source.encode(pixels))
            masks = half_masks(size, *source.shape[1:])
            seen.append(source.seen(pixels, masks))
        behind = torch.cat(seen)[:samples]
        return cls(torch.cat(known)[:samples], behind[:, :1], behind)

    def inside(self, drawn: Tensor, reference: Tensor) -> float:
        """Root mean square difference where the image is generated."""
        return _distance(drawn, reference, self.masks)

    def outside(self, drawn: Tensor) -> float:
        """Root mean square difference to the image where it is known."""
        return _distance(drawn, self.known, 1 - self.masks)


@dataclass(frozen=True)
class LatentPainter:
    """A contender and one way to paint with it: seeing the mask, else blending. name: of its rows."""

    contender: Contender
    name: str

    def paint(self, sampler: LatentSampler, scene: Scene, scale: float) -> Iterator[Tensor]:
        """(n, C, h, w) latents for each of the recipe's seeds."""
        for seed in sampler.recipe.evaluation.seeds:
            if self.name == BLENDED:
                yield sampler.blend(self.contender, scale, seed, scene.known, scene.masks)
            else:
                yield sampler.paint(self.contender, scale, seed, scene.seen)


def latent_painters(everyone: Sequence[Contender]) -> tuple[LatentPainter, ...]:
    """The teacher at all its step counts, and in both ways the students that go into the bundle."""
    teachers = (LatentPainter(c, TEACHER) for c in everyone if c.role == TEACHER and not c.solver)
    students = (LatentPainter(c, name) for c in everyone if c.exported for name in (SEEING, BLENDED))
    return (*teachers, *students)


def measure_latent_inpainting(
    sampler: LatentSampler, painters: Sequence[LatentPainter], scene: Scene, advance: Callable[[], None]
) -> tuple[EvaluationRow, ...]:
    """A row a painter, at the default guidance; the first is the reference of what is drawn inside the masks."""
    scale, reference, rows = sampler.recipe.served.default, dict[int, Tensor](), []
    for painter in painters:
        inside, outside = [], []
        for number, drawn in enumerate(painter.paint(sampler, scene, scale)):
            inside.append(scene.inside(drawn, reference.setdefault(number, drawn)))
            outside.append(scene.outside(drawn))
            advance()
        rows.append(painter.contender.row(scale, {INSIDE: inside, OUTSIDE: outside}, model=painter.name))
    return tuple(rows)


def _distance(one: Tensor, other: Tensor, where: Tensor) -> float:
    """Root mean square difference of (n, C, h, w) where (n, 1, h, w) is 1."""
    squares = (one - other).square().mean(dim=1, keepdim=True)
    return float(((squares * where).sum() / where.sum()).sqrt())
