"""Who takes part in an evaluation: the networks of a finished run folder and the way each is run.

To add a row of the tables, add a Contender to ``contenders``: a role (it decides how guidance is computed and
what an image costs), a step count, the stock folder that holds its ``unet/``, and, where it is not a plain
student, a ``name`` for the tables, its ``sampler``, and the only guidance ``scales`` it can be run at. Cells,
report, curves, verdicts and ``compare`` take it from there. Of the students with a name only the consistency
student is exported; the others are measured.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, Literal

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from distill_jobs.data.digits import NULL_CLASS, class_condition
from distill_jobs.data.masks import seen_channels
from distill_jobs.data.source import Condition
from distill_jobs.recipe import Recipe
from distill_jobs.run_folder import RunFolder
from distill_jobs.sampling import Network, guided_networks, sample, student_network
from distill_jobs.sections import EvaluationSection, Solver
from distill_jobs.solvers import TITLES, solve, solver_timesteps, stock_scheduler
from distill_jobs.student import load_stock, sees_masks, weights_sha256
from engines.guidance import weight_from_scale
from engines.manifest import EvaluationRow, Measured
from engines.sampler import Sampler, SamplerPlan, sampler_plan
from engines.schedule import NoiseSchedule

Role = Literal["teacher", "stage one", "student"]
TEACHER: Final = "teacher"
STAGE_ONE: Final = "stage one"
STUDENT: Final = "student"
CONSISTENCY: Final = "consistency"


@dataclass(frozen=True)
class Contender:
    """One model at one step count.

    folder: its stock diffusers folder; shape: (C, h, w) of its images. name: how tables call it, empty for its
    role. scales: the guidance scales it can be run at, empty for all. solver: a scheduler of diffusers, run
    instead of our plan. unconditional: folder of a second network, for a student that is guided at sampling.
    unguided: the timesteps of its steps at which a teacher has no guidance.
    """

    role: Role
    steps: int
    folder: Path
    shape: tuple[int, int, int]
    sampler: Sampler = "deterministic"
    name: str = ""
    scales: tuple[float, ...] = ()
    solver: Solver | None = None
    unconditional: Path | None = None
    unguided: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        """Its name in tables: ``student``, ``teacher, DPM-Solver++``."""
        name = self.name or self.role
        return f"{name}, {TITLES[self.solver]}" if self.solver else name

    def row(
        self, guidance_scale: float, values: Mapping[str, Sequence[float]], *, model: str = ""
    ) -> EvaluationRow:
        """Its line in a table. values: each metric's by seed; model: what it is called there, if not ``title``."""
        return EvaluationRow(
            model=model or self.title,
            steps=self.steps,
            evaluations=self.evaluations(guidance_scale),
            sampler=self.sampler,
            guidance_scale=guidance_scale,
            metrics={name: Measured.of(each) for name, each in values.items()},
        )

    @property
    def key(self) -> str:
        """A file-name-safe identity: ``stage_one-64``, ``student-4-stochastic``, ``teacher-8-ddim``."""
        name = f"{(self.name or self.role).replace(' ', '_')}-{self.steps}"
        variant = self.solver or (self.sampler if self.sampler != "deterministic" else None)
        return f"{name}-{variant}" if variant else name

    @property
    def exported(self) -> bool:
        """Whether it goes into the bundle."""
        return self.role == STUDENT and self.name in ("", CONSISTENCY)

    def evaluations(self, guidance_scale: float) -> int:
        """Network evaluations an image: two a step that is guided at sampling, one elsewhere and at guidance 1."""
        twice = self._guided_at_sampling and weight_from_scale(guidance_scale) != 0
        return self.steps + (self.steps - len(self.unguided) if twice else 0)

    def limits(self, guidance_scale: float) -> tuple[int, ...]:
        """Its timesteps without guidance, where that changes what it draws: part of what results are known by."""
        return self.unguided if weight_from_scale(guidance_scale) != 0 else ()

    def scales_of(self, settings: EvaluationSection) -> tuple[float, ...]:
        """The guidance scales of the recipe that it can be run at."""
        return tuple(scale for scale in settings.guidance_scales if not self.scales or scale in self.scales)

    def plan(self, recipe: Recipe) -> SamplerPlan:
        return sampler_plan(NoiseSchedule(recipe.schedule), self.steps, self.sampler, clip=recipe.clip)

    def load(self) -> UNet2DConditionModel:
        return load_stock(self.folder).requires_grad_(False)

    def weights_sha256(self) -> str:
        """Hash of the weights on disk. Raises: JobError when there are none."""
        if self.unconditional is None:
            return weights_sha256(self.folder)
        both = weights_sha256(self.folder) + weights_sha256(self.unconditional)
        return hashlib.sha256(both.encode()).hexdigest()

    def network(
        self,
        unet: UNet2DConditionModel,
        guidance_scale: float,
        seen: Tensor | None = None,
        null: Condition | None = None,
    ) -> Network:
        """The sampler's view of a loaded network at a public guidance_scale.

        seen: (B, K, h, w) what a network for inpainting sees; left out, an image hidden as a whole. null: the empty
        condition, one row; left out, the digits'.
        """
        w = weight_from_scale(guidance_scale)
        if seen is None and sees_masks(unet):
            seen = seen_channels(torch.zeros(1, *self.shape), torch.ones(1, 1, *self.shape[1:]))
        if not self._guided_at_sampling:
            return student_network(unet, w, seen)
        second = unet if self.unconditional is None else load_stock(self.unconditional).to(unet.device)
        empty = class_condition(torch.tensor([NULL_CLASS])) if null is None else null
        return guided_networks(unet, second, empty, w, seen, self.unguided)

    @property
    def _guided_at_sampling(self) -> bool:
        return self.role == TEACHER or self.unconditional is not None

    def draw(self, network: Network, recipe: Recipe, condition: Condition, seeds: Sequence[int]) -> Tensor:
        """(B, C, h, w) images of the requests with these seeds and conditions."""
        if self.solver:
            scheduler = stock_scheduler(self.folder, self.solver)
            return solve(network, scheduler, self.steps, condition, seeds, self.shape)
        return sample(network, self.plan(recipe), condition, seeds, self.shape)


def contenders(run_dir: Path, recipe: Recipe) -> tuple[Contender, ...]:
    """The reference first (teacher at the recipe's teacher_steps), then teacher, solvers, stage one and students.

    The teacher is run in as many steps as each student, and in as many as cost what the student does with guidance:
    half of them, more where it is guided in an interval.
    The students are those that go into the bundle: the ones on the way to them are teachers, not products.
    Raises: JobError naming a folder that is missing.
    """
    settings, students = recipe.evaluation, sorted(recipe.export.students, reverse=True)
    finished = sorted(recipe.consistency.students, reverse=True) if recipe.consistency else []
    alike = {*students, *finished}
    twins = sorted({*alike, *(_steps_for(n, recipe) for n in alike)} - {settings.teacher_steps}, reverse=True)
    reference, solver_steps = settings.teacher_steps, sorted(settings.solver_steps, reverse=True)
    folder, shape = RunFolder(run_dir), latent_shape(recipe)
    everyone = (
        Contender(TEACHER, reference, folder.teacher, shape),
        *(Contender(TEACHER, n, folder.teacher, shape) for n in twins),
        *(Contender(TEACHER, n, folder.teacher, shape, solver=s) for s in settings.solvers for n in solver_steps),
        *_of_stage_two(folder, recipe, shape),
        *(Contender(STUDENT, n, folder.consistency, shape, CONSISTENCY, CONSISTENCY) for n in finished),
    )
    for contender in everyone:
        contender.weights_sha256()
    return tuple(guided_where_applied(contender, recipe) for contender in everyone)


def guided_where_applied(contender: Contender, recipe: Recipe) -> Contender:
    """A teacher that is guided where the recipe says; other contenders as they are."""
    if contender.role != TEACHER:
        return contender
    if contender.solver:
        taken = solver_timesteps(contender.folder, contender.solver, contender.steps)
    else:
        taken = [step.timestep for step in contender.plan(recipe)]
    off = recipe.guidance.off(NoiseSchedule(recipe.schedule))
    return replace(contender, unguided=tuple(t for t in taken if t in off))


def _steps_for(evaluations: int, recipe: Recipe) -> int:
    """The most steps that a guided teacher takes in as many evaluations; 1 where it takes none."""
    schedule = NoiseSchedule(recipe.schedule)
    off = recipe.guidance.off(schedule)
    costs = {n: n + sum(t not in off for t in schedule.grid(n)[1:]) for n in range(1, evaluations + 1)}
    return max((n for n, cost in costs.items() if cost <= evaluations), default=1)


def _of_stage_two(folder: RunFolder, recipe: Recipe, shape: tuple[int, int, int]) -> Iterator[Contender]:
    """Stage one, where the chain learns from it, and the chain's students, each at the guidance it is for."""
    section, guidance = recipe.stage_two, recipe.stage_two.guidance
    student = partial(Contender, STUDENT, shape=shape, sampler=section.sampler)
    if guidance != "at_sampling" and section.first_target == "stage_one":
        yield Contender(STAGE_ONE, recipe.evaluation.teacher_steps, folder.stage_one, shape)
    for n in sorted(recipe.export.students, reverse=True):
        if guidance == "at_sampling":
            yield student(n, folder.student(n), name="two networks", unconditional=folder.unconditional(n))
        else:
            yield student(n, folder.student(n), scales=() if guidance == "input" else (guidance,))


def latent_shape(recipe: Recipe) -> tuple[int, int, int]:
    """(C, h, w) of what the recipe's networks denoise."""
    side = int(recipe.unet["sample_size"])
    return int(recipe.unet["out_channels"]), side, side
