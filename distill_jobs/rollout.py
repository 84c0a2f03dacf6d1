"""On-policy states: rows whose z_t is where the student itself arrives, instead of noisy data.

Data made noisy is not what a student meets when it draws: its own first steps bring it there, errors included.
The target stays the teacher's two steps, from that state on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill_jobs.draws import Draw, Draws
from distill_jobs.objectives import Noisy
from distill_jobs.recipe import Recipe
from distill_jobs.sections import ChainSection, StageTwoSection
from distill_jobs.student import predict
from engines.sampler import SamplerPlan, sampler_plan
from engines.schedule import NoiseSchedule


@dataclass(frozen=True)
class Rollout:
    """plan: the student's own; share: of the rows."""

    plan: SamplerPlan
    share: float

    @classmethod
    def of(cls, recipe: Recipe, section: ChainSection, n: int) -> Rollout | None:
        """For the n-step student of a chain, or None where all its states are noisy data."""
        if not isinstance(section, StageTwoSection) or section.on_policy == 0:
            return None
        plan = sampler_plan(NoiseSchedule(recipe.schedule), n, section.sampler, clip=recipe.clip)
        return cls(plan, section.on_policy)

    def replace(
        self,
        z_t: Tensor,
        student: nn.Module,
        draws: Draws,
        update: int,
        rows: Noisy,
        point: Tensor,
        w: Tensor | None,
    ) -> Tensor:
        """z_t: (B, C, h, w) with a share of its rows replaced by the student's own. point: (B,) grid point - 1."""
        chosen = (draws.stratified(update, len(z_t), Draw.POLICY) < self.share).to(z_t.device)
        noise = [
            draws.normal(update, tuple(z_t.shape), Draw.ROLLOUT, position).to(z_t.device)[chosen]
            for position, step in enumerate(self.plan.steps[:-1])
            if step.stochastic
        ]
        own = self.arrive(student, rows[chosen], point[chosen], None if w is None else w[chosen], noise)
        mixed = z_t.clone()
        mixed[chosen] = own
        return mixed

    @torch.no_grad()
    def arrive(
        self, student: nn.Module, rows: Noisy, point: Tensor, w: Tensor | None, noise: list[Tensor]
    ) -> Tensor:
        """Where the student stands at each row's point when it has drawn from pure noise, rows.noise.

        noise: fresh, of each step that takes some; shaped as rows.noise.
        """
        z = rows.noise.clone()
        last = len(self.plan) - 1
        for position, step in enumerate(self.plan.steps[:-1]):
            moving = point < last - position
            if not bool(moving.any()):
                break
            here = rows[moving]
            t = torch.full_like(here.t, step.timestep)
            v = predict(student, z[moving], t, here.condition, None if w is None else w[moving], here.extra)
            z[moving], _ = step.apply(z[moving], v, noise[position][moving] if step.stochastic else 0.0)
        return z
