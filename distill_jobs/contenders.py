"""Who takes part in an evaluation: the networks of a finished run folder and the plans they are run with."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import UNet2DConditionModel

from distill_jobs.data.digits import NULL_CLASS, class_condition
from distill_jobs.errors import JobError
from distill_jobs.recipe import Recipe
from distill_jobs.run_folder import RunFolder
from distill_jobs.sampling import Network, guided_teacher, student_network
from distill_jobs.student import load_stock
from engines.guidance import weight_from_scale
from engines.sampler import Sampler, SamplerPlan, sampler_plan
from engines.schedule import NoiseSchedule

TEACHER, STAGE_ONE, STUDENT = "teacher", "stage one", "student"
Role = Literal["teacher", "stage one", "student"]


@dataclass(frozen=True)
class Contender:
    """One model at one step count. folder: its stock diffusers folder; shape: (C, h, w) of its images."""

    role: Role
    steps: int
    folder: Path
    shape: tuple[int, int, int]
    sampler: Sampler = "deterministic"

    @property
    def key(self) -> str:
        """A file-name-safe identity: ``stage_one-64``, ``student-4-stochastic``."""
        name = f"{self.role.replace(' ', '_')}-{self.steps}"
        return name if self.sampler == "deterministic" else f"{name}-{self.sampler}"

    @property
    def evaluations(self) -> int:
        """Network evaluations an image; a guided teacher step counts two at every guidance."""
        return self.steps * (2 if self.role == TEACHER else 1)

    def computed(self, guidance_scale: float) -> int:
        """Evaluations that are really run: the teacher's unconditional one is spared at guidance 1."""
        spared = self.role == TEACHER and weight_from_scale(guidance_scale) == 0
        return self.steps if spared else self.evaluations

    def plan(self, recipe: Recipe) -> SamplerPlan:
        return sampler_plan(NoiseSchedule(recipe.schedule), self.steps, self.sampler, clip=recipe.clip)

    def load(self) -> UNet2DConditionModel:
        return load_stock(self.folder).requires_grad_(False)

    def weights_sha256(self) -> str:
        """Hash of the weights on disk. Raises: JobError when there are none."""
        file = self.folder / "unet" / "diffusion_pytorch_model.safetensors"
        if not file.is_file():
            raise JobError(f"{self.folder} holds no trained {self.role}; finish the job first, with --resume")
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    def network(self, unet: UNet2DConditionModel, guidance_scale: float) -> Network:
        """The sampler's view of a loaded network at a public guidance_scale."""
        w = weight_from_scale(guidance_scale)
        if self.role == TEACHER:
            return guided_teacher(unet, class_condition(torch.tensor([NULL_CLASS])), w)
        return student_network(unet, w)


def contenders(run_dir: Path, recipe: Recipe) -> tuple[Contender, ...]:
    """The reference first (teacher at the recipe's teacher_steps), then teacher, stage one and students.

    The students are those that go into the bundle: the ones on the way to them are teachers, not products.
    Raises: JobError naming a folder that is missing.
    """
    reference, students = recipe.evaluation.teacher_steps, sorted(recipe.export.students, reverse=True)
    folder, shape = RunFolder(run_dir), latent_shape(recipe)
    everyone = (
        Contender("teacher", reference, folder.teacher, shape),
        *(Contender("teacher", n, folder.teacher, shape) for n in students if n != reference),
        Contender("stage one", reference, folder.stage_one, shape),
        *(Contender("student", n, folder.student(n), shape, recipe.stage_two.sampler) for n in students),
    )
    for contender in everyone:
        contender.weights_sha256()
    return everyone


def latent_shape(recipe: Recipe) -> tuple[int, int, int]:
    """(C, h, w) of what the recipe's networks denoise."""
    side = int(recipe.unet["sample_size"])
    return int(recipe.unet["out_channels"]), side, side
