"""The encoders of a finished run: students that walk from an image to its noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffusers import UNet2DConditionModel

from distill_jobs.recipe import Recipe
from distill_jobs.run_folder import RunFolder
from distill_jobs.student import load_stock, weights_sha256
from engines.sampler import SamplerPlan, encoder_plan
from engines.schedule import NoiseSchedule


@dataclass(frozen=True)
class Encoder:
    """One encoder at the step count it was trained for. folder: its stock diffusers folder."""

    steps: int
    folder: Path

    @property
    def key(self) -> str:
        return f"encoder-{self.steps}"

    def plan(self, recipe: Recipe) -> SamplerPlan:
        return encoder_plan(NoiseSchedule(recipe.schedule), self.steps)

    def load(self) -> UNet2DConditionModel:
        return load_stock(self.folder).requires_grad_(False)

    def weights_sha256(self) -> str:
        """Hash of the weights on disk. Raises: JobError when there are none."""
        return weights_sha256(self.folder)


def encoders(run_dir: Path, recipe: Recipe) -> tuple[Encoder, ...]:
    """Those that go into the bundle, most steps first; none without an encoder section.

    Raises: JobError naming a folder that is missing.
    """
    if recipe.encoder is None:
        return ()
    folder = RunFolder(run_dir)
    found = tuple(Encoder(n, folder.encoder(n)) for n in sorted(recipe.encoder.students, reverse=True))
    for encoder in found:
        encoder.weights_sha256()
    return found
