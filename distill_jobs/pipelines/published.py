"""Published few-step students: which of our samplers their scheduler is, and what says that it is none of them.

| scheduler | whose | our sampler |
|---|---|---|
| LCMScheduler | latent consistency models | consistency |
| EulerDiscreteScheduler | SD Turbo, SDXL-Lightning | deterministic |
| EulerAncestralDiscreteScheduler | SDXL Turbo | ancestral |
| DDIMScheduler | Hyper-SD and others | deterministic |

LCMScheduler's boundary terms, at most 1.3e-7 of the latent in 8 steps, are left out; its timesteps are picked from
the points of its training, and need not be our grid. Euler's steps of x_t/alpha are DDIM's of x_t, and trailing
timesteps are our grid. Whether a UNet takes the guidance weight (``time_cond_proj_dim``) is a question of its own.
Sources: Luo et al. 2023; Sauer et al. 2023; Lin et al. 2024; diffusers' schedulers of these names.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
from pydantic import TypeAdapter, ValidationError

from distill_jobs.errors import RecipeError
from distill_jobs.pipelines.checks import open_folder
from distill_jobs.pipelines.folder import PipelineFolder, read_json
from distill_jobs.student import GUIDANCE_WIDTH, Trained
from engines.manifest import GuidanceRange
from engines.sampler import Prediction, Sampler, SamplerPlan, plan_through
from engines.schedule import NoiseSchedule

GUIDANCE_INPUT = GuidanceRange(min=1, max=15, default=8.5)
"""Of a model that takes guidance as an input, unless told otherwise."""

NO_GUIDANCE = GuidanceRange(min=1, max=1, default=1)
Scales = tuple[float | None, float | None, float | None]
LCM_STEPS = (4, 1, 2, 3, 5, 6, 7, 8)
"""What the cards of such models recommend, the default first."""


@dataclass(frozen=True)
class Scheduler:
    """A scheduler of diffusers as one of our samplers.

    settings: what its config must say for that; predictions: those it can run; full_start: drawing starts at noise
    of variance 1, else at that of the last table index.
    """

    sampler: Sampler
    settings: dict[str, Any] = field(default_factory=dict)
    predictions: tuple[Prediction, ...] = ("epsilon", "v_prediction", "sample")
    full_start: bool = True


SCHEDULERS = {
    "LCMScheduler": Scheduler(
        "consistency",
        {"clip_sample": False, "timestep_scaling": 10.0},
        predictions=("epsilon", "v_prediction"),
    ),
    "EulerDiscreteScheduler": Scheduler(
        "deterministic",
        {
            "timestep_spacing": "trailing",
            "interpolation_type": "linear",
            "use_karras_sigmas": False,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
            "timestep_type": "discrete",
            "final_sigmas_type": "zero",
            "rescale_betas_zero_snr": False,
        },
        full_start=False,
    ),
    "EulerAncestralDiscreteScheduler": Scheduler(
        "ancestral",
        {"timestep_spacing": "trailing", "rescale_betas_zero_snr": False},
        predictions=("epsilon", "v_prediction"),
        full_start=False,
    ),
    "DDIMScheduler": Scheduler(
        "deterministic", {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
    ),
}


@dataclass(frozen=True)
class Published:
    """A published student that we can run.

    guided: its UNet takes the guidance weight; trained: its step counts, where it was made here and says them;
    asked: the guidance that it was then trained for, where it says that too.
    """

    folder: PipelineFolder
    scheduler: Scheduler
    guided: bool
    trained: tuple[int, ...] = ()
    asked: GuidanceRange | None = None

    @property
    def initial_std(self) -> float:
        """Standard deviation of the noise that drawing starts at."""
        schedule = NoiseSchedule(self.folder.schedule)
        return 1.0 if self.scheduler.full_start else schedule.at(schedule.timesteps - 1)[1]

    def guidance(self, scales: Scales) -> GuidanceRange:
        """The guidance range to serve. scales: least, largest and default that are wanted, None for what is usual.

        Raises: TeacherError when any is wanted of a model that has none, or more than it was trained for;
        RecipeError where they are no range.
        """
        given = any(scale is not None for scale in scales)
        if not self.guided and given:
            raise self.folder.wrong(
                "its unet takes no guidance weight (time_cond_proj_dim); leave --guidance-… out"
            )
        if not self.guided:
            return NO_GUIDANCE
        usual = self.asked or GUIDANCE_INPUT
        low, high, default = (
            own if scale is None else scale
            for scale, own in zip(scales, (usual.min, usual.max, usual.default), strict=True)
        )
        if self.trained and self.asked is None and None in scales:
            raise self.folder.wrong(
                "student.json does not say which guidance it was trained for, as that of an older run; give it: "
                "--guidance-min, --guidance-max and --guidance-default"
            )
        if not (1 <= low <= default <= high and math.isfinite(high)):
            raise RecipeError("guidance needs 1 <= --guidance-min <= --guidance-default <= --guidance-max")
        if self.asked is not None and not self.asked.min <= low <= high <= self.asked.max:
            raise self.folder.wrong(
                f"student.json: it was trained for guidance {self.asked.min:g} to {self.asked.max:g}, not for "
                f"{low:g} to {high:g}"
            )
        return GuidanceRange(min=low, max=high, default=default)

    def plans(self, steps: Sequence[int] | None) -> dict[int, SamplerPlan]:
        """By step count. Raises: TeacherError naming a step count that the model cannot be run at."""
        if self.trained:
            if off := sorted(set(steps or ()) - set(self.trained)):
                raise self.folder.wrong(f"student.json: it was trained for {self.trained} steps, not for {off}")
            return {n: self._plan(n) for n in steps or self.trained}
        if not steps and self.scheduler.sampler != "consistency":
            raise self.folder.wrong(
                "nothing in it says which step counts it was trained for; give them: import --steps N"
            )
        return {n: self._plan(n) for n in steps or LCM_STEPS}

    def _plan(self, n: int) -> SamplerPlan:
        folder, schedule = self.folder, NoiseSchedule(self.folder.schedule)
        try:
            plan = plan_through(schedule, self._timesteps(n), self.scheduler.sampler, folder.prediction)
        except ValueError as error:
            raise folder.wrong(f"{n} steps: {error}") from None
        if folder.class_of("scheduler") == "DDIMScheduler":
            self._check_strides(plan)
        return plan

    def _timesteps(self, n: int) -> tuple[int, ...]:
        """The n table indices at which the scheduler asks the network, noisiest first. Raises: ValueError."""
        if self.folder.class_of("scheduler") == "LCMScheduler":
            trained = int(self.folder.config("scheduler").get("original_inference_steps", 50))
            return lcm_timesteps(n, trained, self.folder.schedule.timesteps)
        return NoiseSchedule(self.folder.schedule).grid(n)[:0:-1]

    def _check_strides(self, plan: SamplerPlan) -> None:
        """This scheduler's steps are all equally long, where ours end at the next point."""
        stride = self.folder.schedule.timesteps // len(plan)
        if any(step.timestep - step.target != stride for step in plan):
            raise self.folder.wrong(
                f"DDIMScheduler would not end {len(plan)} steps at the points where it asks the network; "
                f"choose step counts that divide {self.folder.schedule.timesteps}"
            )


def lcm_timesteps(n: int, trained: int, total: int) -> tuple[int, ...]:
    """LCMScheduler's n steps, noisiest first: every (trained/n)th of its points, or the noisier one beside.

    trained: how many points; total: table indices that they are evenly spread over. Raises: ValueError for more
    steps than points.
    """
    if not 1 <= n <= trained:
        raise ValueError(f"LCMScheduler takes 1 to {trained}, its original_inference_steps")
    picked = np.floor(np.linspace(0, trained, num=n, endpoint=False)).astype(int)
    return tuple((trained - int(i)) * (total // trained) - 1 for i in picked)


def open_published(path: Path) -> Published:
    """The student in a pipeline folder. Raises: TeacherError naming why it cannot be run exactly."""
    folder = open_folder(path)
    width = folder.config("unet").get("time_cond_proj_dim")
    if width not in (None, GUIDANCE_WIDTH):
        raise folder.wrong(
            f"unet: time_cond_proj_dim is {width}; only {GUIDANCE_WIDTH} values, or none, can be imported"
        )
    if folder.extra_channels:
        raise folder.wrong("its unet sees a mask; such models cannot be imported")
    told = _told(folder)
    asked = None if told is None else told.guidance_scale
    return Published(folder, _scheduler(folder), width is not None, _steps(folder, told), asked)


def _told(folder: PipelineFolder) -> Trained | None:
    """What a student that was made here says of itself; None of others'."""
    file = folder.path / "student.json"
    if not file.is_file():
        return None
    try:
        return TypeAdapter(Trained).validate_python(read_json(file))
    except ValidationError as error:
        raise folder.wrong(f"student.json cannot be read: {error.errors()[0]['msg']}") from None


def _steps(folder: PipelineFolder, told: Trained | None) -> tuple[int, ...]:
    """The step counts of a student that was made here, those that its scheduler can run; empty for others'."""
    if told is None:
        return ()
    points = folder.config("scheduler").get("original_inference_steps", told.steps[0])
    return tuple(n for n in told.steps if points % n == 0)


def _scheduler(folder: PipelineFolder) -> Scheduler:
    kind, config = folder.class_of("scheduler"), folder.config("scheduler")
    if (saved := config.get("_class_name", kind)) != kind:
        raise folder.wrong(
            f"model_index.json names {kind} as its scheduler, scheduler/scheduler_config.json {saved}; give both "
            "the one that the model is sampled with"
        )
    known = SCHEDULERS.get(kind)
    if known is None:
        raise folder.wrong(f"its scheduler is {kind}; of published students only those of {', '.join(SCHEDULERS)}")
    defaults = inspect.signature(getattr(diffusers, kind).__init__).parameters
    for name, needed in known.settings.items():
        value = config.get(name, defaults[name].default)
        if (value or False) != needed:  # some configs say null for false
            raise folder.wrong(f"scheduler: {name} is {value!r}; {kind} can be imported with {needed!r} only")
    if folder.prediction not in known.predictions:
        raise folder.wrong(
            f"scheduler: prediction_type is {folder.prediction}; {kind} can be imported with "
            f"{' or '.join(known.predictions)} only"
        )
    return known
