"""What a recipe will do and cost, before anything starts: counted on networks without weights."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID

from distill_jobs.costs import (
    NetworkCost,
    autoencoder_cost,
    decoder_costs,
    encoding_flops,
    network_cost,
    words_cost,
)
from distill_jobs.job import run_job
from distill_jobs.latent_sections import FolderTeacher, LatentTeacher, MadeTeacher
from distill_jobs.recipe import Recipe
from distill_jobs.sections import Training
from distill_jobs.student import GUIDANCE_WIDTH
from engines.schedule import NoiseSchedule

FLOAT = 4
KEPT_CHECKPOINTS = 3  # two, and the one being written
TRAINED_PASSES, RECOMPUTED_PASSES = 3, 1
MEASURED_UPDATES = 6
# An update's FLOPs up to which a few real ones are run: seconds on the device.
MEASURABLE_FLOPS = {"cpu": 5e10, "cuda": 1e14}
# Dense bf16 TFLOP/s of the makers' data sheets, of which training UNets reaches about the share below.
DEVICES = {"NVIDIA H100 SXM": 989.0, "NVIDIA A100": 312.0, "NVIDIA L40S": 362.0, "NVIDIA RTX 4090": 165.0}
UTILISATION = 0.3


@dataclass(frozen=True)
class PhasePlan:
    """One phase. trained: its network; frozen: the network that it learns from; frozen_passes: of it, a row.

    encoding: FLOPs of a row that is encoded anew, as what a mask leaves of an image is. beside: parameters of the
    whole network that is kept beside the trained one, of adapters and of shared weights.
    """

    name: str
    training: Training
    trained: NetworkCost
    frozen: NetworkCost | None
    frozen_passes: float
    encoding: float = 0.0
    beside: int = 0

    def flops(self, recomputed: bool) -> float:
        """Of one update, over all processes. recomputed: with gradient checkpointing."""
        passes = TRAINED_PASSES + (RECOMPUTED_PASSES if recomputed else 0)
        frozen = self.frozen_passes * self.frozen.flops if self.frozen else 0.0
        return self.training.batch_size * (passes * self.trained.flops + frozen + self.encoding)

    @property
    def checkpoint_bytes(self) -> int:
        """Weights, two moments, and the average where there is one."""
        return self.trained.parameters * FLOAT * (4 if self.training.ema else 3)

    @property
    def memory_bytes(self) -> int:
        """Of all processes together, without activations: weights, gradients, moments, average, frozen network."""
        held = self.trained.parameters * (5 if self.training.ema else 4)
        return FLOAT * (held + (self.frozen.parameters if self.frozen else 0))


@dataclass(frozen=True)
class Plan:
    """A recipe's phases in their order. taken: names of those that are copied from another run."""

    recipe: Recipe
    phases: tuple[PhasePlan, ...]
    taken: frozenset[str] = frozenset()

    @property
    def ahead(self) -> tuple[PhasePlan, ...]:
        """The phases to train."""
        return tuple(phase for phase in self.phases if phase.name not in self.taken)

    @property
    def flops(self) -> float:
        recomputed = self.recipe.compute.gradient_checkpointing
        return sum(phase.training.updates * phase.flops(recomputed) for phase in self.ahead)

    @property
    def memory_bytes(self) -> int:
        """Of the largest phase, without activations."""
        return max((phase.memory_bytes for phase in self.ahead), default=0)

    @property
    def disk_bytes(self) -> int:
        """The finished networks, and the checkpoints of the largest phase."""
        finished = sum((phase.trained.parameters + phase.beside) * FLOAT for phase in self.phases)
        if isinstance(self.recipe.teacher, FolderTeacher) and self.recipe.teacher.v_finetune is None:
            finished += network_cost(self.recipe.unet).parameters * FLOAT  # the folder's, as the run keeps it
        return finished + KEPT_CHECKPOINTS * max((phase.checkpoint_bytes for phase in self.ahead), default=0)

    def measurable(self, device: torch.device) -> bool:
        """Whether a few real updates take seconds on this device. A pipeline is not loaded or made for a plan."""
        if isinstance(self.recipe.teacher, LatentTeacher):
            return False
        largest = max(phase.flops(self.recipe.compute.gradient_checkpointing) for phase in self.phases)
        return largest <= MEASURABLE_FLOPS.get(device.type, 0.0)


def plan_of(recipe: Recipe) -> Plan:
    """The plan of a recipe. Raises: RecipeError when diffusers refuses the network's arguments."""
    teacher = network_cost(recipe.unet)
    student = network_cost({**recipe.unet, "time_cond_proj_dim": GUIDANCE_WIDTH})
    phases = list(_teacher_phases(recipe, teacher))
    if recipe.stage_two.guidance != "at_sampling":
        twice = _guided_passes(recipe, recipe.stage_one.unguided_share)
        phases.append(PhasePlan("stage_one", recipe.stage_one, student, teacher, twice))
    phases += _halvings(recipe, teacher, student)
    if recipe.consistency is not None:  # learns from two passes: the teacher's, and its own average's
        phases.append(PhasePlan("consistency", recipe.consistency, student, student, 2))
    if recipe.encoder is not None:
        phases += [
            PhasePlan(f"e{halving.steps}", recipe.encoder.training(halving), student, student, 2)
            for halving in recipe.encoder.halvings
        ]
    if recipe.inpainting is not None and isinstance(recipe.teacher, FolderTeacher):
        encoding = encoding_flops(int(recipe.unet["sample_size"]))
        phases = [replace(phase, encoding=encoding) for phase in phases]
    if recipe.decoder is not None:
        made = recipe.teacher.autoencoder if isinstance(recipe.teacher, MadeTeacher) else None
        tiny, frozen = decoder_costs(recipe.decoder, made, int(recipe.unet["sample_size"]))
        phases.append(PhasePlan("decoder", recipe.decoder, tiny, frozen, int(recipe.decoder.target == "teacher")))
    return Plan(recipe, tuple(phases))


def _teacher_phases(recipe: Recipe, network: NetworkCost) -> tuple[PhasePlan, ...]:
    """How the teacher is made; nothing where a folder's is taken as it is."""
    if isinstance(recipe.teacher, MadeTeacher):
        section = recipe.teacher
        side = int(recipe.unet["sample_size"]) * section.autoencoder.pixels_per_latent
        made = [PhasePlan("autoencoder", section.autoencoder, autoencoder_cost(section.autoencoder, side), None, 0)]
        if section.text.training is not None:
            cost = words_cost(section.text, recipe.unet)
            made.append(PhasePlan("text_encoder", section.text.training, cost, None, 0))
        made.append(PhasePlan("teacher", section, network, None, 0))
        if section.finetune is not None:
            made.append(PhasePlan("finetune", section.finetune, network, None, 0))
        return tuple(made)
    if not isinstance(recipe.teacher, FolderTeacher):
        return (PhasePlan("teacher", recipe.teacher, network, None, 0),)
    training = recipe.teacher.v_finetune
    if training is None:
        return ()
    frozen, passes = (network, 1) if training.target == "teacher" else (None, 0)
    return (PhasePlan("v_finetune", training, network, frozen, passes),)


def _halvings(recipe: Recipe, teacher: NetworkCost, student: NetworkCost) -> list[PhasePlan]:
    """The phases of stage two. An on-policy row takes half of its student's other steps, on average."""
    section = recipe.stage_two
    trained = halved = student
    beside = 0 if section.weights == "separate" and section.lora is None else student.parameters
    if section.guidance == "at_sampling":
        trained = halved = teacher
    elif section.weights == "shared":  # learns from two: stage one, and itself as the phase found it
        trained = network_cost({**recipe.unet, "time_cond_proj_dim": 2 * GUIDANCE_WIDTH})
        halved = replace(trained, parameters=student.parameters + trained.parameters)
    elif section.lora is not None:  # over a frozen stage one
        trained = network_cost({**recipe.unet, "time_cond_proj_dim": GUIDANCE_WIDTH}, section.lora.rank)
        halved = replace(student, parameters=2 * student.parameters)
    passes = _guided_passes(recipe, section.unguided_share, section.guided_share)
    more = 2 * (passes - 1) if section.first_target == "teacher" else 0
    return [
        PhasePlan(
            f"{prefix}{halving.steps}",
            section.training(halving),
            trained,
            halved,
            2 + section.on_policy * (halving.steps - 1) / 2 + more * share,
            beside=beside,
        )
        for prefix in ("du" if section.guidance == "at_sampling" else "d")
        for halving, share in zip(section.halvings, section.first_shares, strict=True)
    ]


def _guided_passes(recipe: Recipe, unguided_share: float, guided_share: float | None = None) -> float:
    """The teacher's evaluations for a row's true guidance: one where guidance is off, two elsewhere.

    As of rows at all timesteps alike, but for ``guided_share`` of them; a grid, and the share of late rows, have a
    little more or less.
    """
    off = len(recipe.guidance.off(NoiseSchedule(recipe.schedule))) / recipe.schedule.timesteps
    if guided_share is not None:
        off = 1 - guided_share
    return 2 - off - (1 - off) * (unguided_share if recipe.guidance.min == 1 else 0)


@dataclass(frozen=True)
class Measured:
    """seconds: of an update, by phase."""

    seconds: dict[str, float]

    def total(self, plan: Plan) -> float:
        """Seconds of training; a phase that was not measured costs what the first halving does, by their FLOPs."""
        recomputed = plan.recipe.compute.gradient_checkpointing
        halving = next(p for p in plan.phases if p.name in self.seconds and p.name not in {"teacher", "stage_one"})
        per_flop = self.seconds[halving.name] / halving.flops(recomputed)
        return sum(
            phase.training.updates * self.seconds.get(phase.name, per_flop * phase.flops(recomputed))
            for phase in plan.ahead
        )


def measure(recipe: Recipe) -> Measured:
    """Run a few real updates of teacher, stage one, the first halving and consistency in a temporary folder."""
    if isinstance(recipe.teacher, LatentTeacher):
        raise ValueError("a plan is measured on recipes that train their teacher")
    first = [halving.model_copy(update={"updates": MEASURED_UPDATES}) for halving in recipe.stage_two.halvings[:1]]
    few = {"updates": MEASURED_UPDATES}
    short = recipe.model_copy(
        update={
            "teacher": recipe.teacher.model_copy(update=few),
            "stage_one": recipe.stage_one.model_copy(update={**few, "max_relative_error": float("inf")}),
            "stage_two": recipe.stage_two.model_copy(update={"halvings": tuple(first)}),
            "consistency": recipe.consistency
            and recipe.consistency.model_copy(update={**few, "source": "stage_one"}),
            "encoder": None,
        }
    )
    watch = _Stopwatch()
    with tempfile.TemporaryDirectory(prefix="halfstep-dry-run-") as folder:
        run_job(short, Path(folder) / "run", resume=False, progress=watch)
    return Measured({name: statistics.median(spent[1:]) for name, spent in watch.spent.items()})


class _Stopwatch(Progress):
    """Seconds between the reports of each task; shows nothing."""

    def __init__(self) -> None:
        super().__init__(console=Console(quiet=True), disable=True)
        self.spent: dict[str, list[float]] = {}
        self._last = 0.0

    def add_task(self, *args: Any, **kwargs: Any) -> TaskID:
        self._last = time.monotonic()
        return super().add_task(*args, **kwargs)

    def update(self, task_id: TaskID, **kwargs: Any) -> None:
        super().update(task_id, **kwargs)
        if "completed" in kwargs:
            now = time.monotonic()
            self.spent.setdefault(self._tasks[task_id].description, []).append(now - self._last)
            self._last = now
