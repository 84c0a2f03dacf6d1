"""The sections of a recipe: what each phase of a job can be told."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from engines.manifest import GuidanceRange
from engines.schedule import NoiseSchedule

StoredWeights = Literal["float32", "float16"]
"""What a bundle's files keep weights in."""


def _each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if twice := [value for place, value in enumerate(values) if value in values[:place]]:
        raise ValueError(f"{twice[0]} is given twice")
    return values


Once = AfterValidator(_each_once)
"""Of a list in which nothing may stand twice."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class GuidanceSection(GuidanceRange):
    """The guidance_scale that students are made for, and where the teacher that they learn from is guided.

    log_snr_min, log_snr_max: only at timesteps whose log-SNR, log(alpha² / sigma²), is within these, both included;
    null for no bound. Elsewhere the teacher's prediction with the condition is all there is, at any guidance_scale.
    Source: Kynkäänniemi et al. 2024, whose interval is of sigma / alpha = exp(-log-SNR / 2).
    """

    log_snr_min: float | None = Field(None, allow_inf_nan=False)
    log_snr_max: float | None = Field(None, allow_inf_nan=False)

    @property
    def interval(self) -> str:
        """Where there is guidance, in words; empty for everywhere."""
        low, high = self.log_snr_min, self.log_snr_max
        if low is None:
            return "" if high is None else f"up to log-SNR {high:g}"
        return f"from log-SNR {low:g}" + ("" if high is None else f" to {high:g}")

    def off(self, schedule: NoiseSchedule) -> frozenset[int]:
        """The table indices of a schedule at which there is no guidance."""
        log_snr = schedule.log_snr
        low = -np.inf if self.log_snr_min is None else self.log_snr_min
        high = np.inf if self.log_snr_max is None else self.log_snr_max
        return frozenset(np.flatnonzero((log_snr < low) | (log_snr > high)).tolist())


class Training(Section):
    """One optimisation phase. ema: decay, or null for none; lr falls linearly to 0 when ``anneal``."""

    updates: int = Field(ge=1)
    batch_size: int = Field(64, ge=1, description="rows of an update, over all processes and micro-batches")
    accumulate: int = Field(1, ge=1, description="micro-batches an update, in each process")
    lr: float = Field(1e-3, gt=0)
    warmup: int = Field(50, ge=0, description="updates of linear warm-up")
    anneal: bool = True
    ema: float | None = Field(None, gt=0, lt=1)
    clip_norm: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _splits_evenly(self) -> Self:
        _check_split(self.batch_size, self.accumulate)
        return self


class Denoising(Training):
    """Training at all timesteps.

    late_share: share of rows whose timestep is drawn from the noisiest ones alone, where the prompt decides what is
    drawn; those of the others are uniform.
    """

    late_share: float = Field(0.0, ge=0, lt=1)


class TeacherSection(Denoising):
    """Teaching a network to denoise the data."""

    condition_dropout: float = Field(0.1, gt=0, lt=1)


class StageOneSection(Denoising):
    """Folding guidance into one network.

    unguided_share: share of rows drawn at the range's lowest guidance exactly. w_power: the loss of a row that has
    guidance in its target is divided by (1 + w)^w_power, since that target's scale grows with w.
    max_relative_error: gate on the relative v-error against true guidance, at several guidance scales, before any
    halving starts.
    """

    unguided_share: float = Field(0.1, ge=0, lt=1)
    w_power: float = Field(1.0, ge=0)
    max_relative_error: float = Field(0.1, gt=0)


class Halving(Section):
    """One student of stage two: its step count and how long it trains.

    lr: its own learning rate, or null for the chain's. With shared weights only: newest_share, of rows that are on
    this grid, while the others rehearse the grids before it; keep, this grid and those before it are served by the
    network as this phase leaves it, not as the last one does.
    """

    steps: int = Field(ge=1)
    updates: int = Field(ge=1)
    lr: float | None = Field(None, gt=0)
    newest_share: float = Field(0.5, gt=0, le=1)
    keep: bool = False

    @property
    def says_of_sharing(self) -> str | None:
        """The field set here that is for shared weights only."""
        names = ("newest_share", "keep")
        return next((n for n in names if getattr(self, n) != type(self).model_fields[n].default), None)


class ChainSection(Section):
    """A chain of halvings, each starting from the one before; the first from the stage-one student.

    guided_share: of a teacher guided in an interval, share of a grid's rows that are at steps with guidance in
    them, where most of the error is; null for all steps equally often, as they are on grids that have guidance in
    all steps or in none.
    """

    halvings: tuple[Halving, ...]
    batch_size: int = Field(64, ge=1)
    accumulate: int = Field(1, ge=1)
    lr: float = Field(5e-4, gt=0)
    warmup: int = Field(20, ge=0)
    ema: float | None = Field(None, gt=0, lt=1)
    clip_norm: float = Field(1.0, gt=0)
    unguided_share: float = Field(0.1, ge=0, lt=1)
    w_power: float = Field(1.0, ge=0)
    guided_share: float | None = Field(None, gt=0, lt=1)

    @model_validator(mode="after")
    def _splits_evenly(self) -> Self:
        _check_split(self.batch_size, self.accumulate)
        return self

    @model_validator(mode="after")
    def _halves(self) -> Self:
        if any(a != 2 * b for a, b in pairwise(self.steps)):
            raise ValueError("halvings must halve: each steps value is half of the one before")
        return self

    @property
    def steps(self) -> tuple[int, ...]:
        """The step counts it trains, most first."""
        return tuple(halving.steps for halving in self.halvings)

    def training(self, halving: Halving) -> Training:
        return Training(
            updates=halving.updates,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            lr=self.lr if halving.lr is None else halving.lr,
            warmup=self.warmup,
            anneal=True,
            ema=self.ema,
            clip_norm=self.clip_norm,
        )


def _check_split(batch_size: int, accumulate: int) -> None:
    if batch_size % accumulate:
        raise ValueError(
            f"batch_size {batch_size} cannot be split into accumulate {accumulate} equal micro-batches"
        )


class LoraSection(Section):
    """Low-rank adapters over the stage-one network. rank: of the adapter of every layer."""

    rank: int = Field(8, ge=1)


class StageTwoSection(ChainSection):
    """The halvings of the students that draw; none where consistency starts from stage one.

    sampler: whose steps the students learn; they serve no other. weights: a network for every step count, or
    one for all of them that is told its grid. guidance: an input, as everywhere else; or a guidance_scale, the
    only one these students are for; or at_sampling, where a conditional and an unconditional network are halved
    without guidance and combined when sampling: the paper's two baselines. first_target: whose two steps the first
    halving learns, stage one's as in the paper, or those of the teacher under guidance: two evaluations more, and
    none of stage one's error is handed on, which is then where it starts. on_policy: share of the rows whose z_t is
    where the student itself arrives, instead of noisy data. lora: train adapters only.
    """

    sampler: Literal["deterministic", "stochastic"] = "deterministic"
    weights: Literal["separate", "shared"] = "separate"
    guidance: Literal["input", "at_sampling"] | Annotated[float, Field(ge=1)] = "input"
    first_target: Literal["stage_one", "teacher"] = "stage_one"
    on_policy: float = Field(0.0, ge=0, le=1)
    lora: LoraSection | None = None

    @property
    def networks(self) -> tuple[tuple[int, ...], ...]:
        """The step counts that each network serves, most first; with weights of their own, one each."""
        ends = [i for i, h in enumerate(self.halvings, start=1) if h.keep or self.weights == "separate"]
        edges = sorted({0, *ends, len(self.halvings)})
        return tuple(self.steps[a:b] for a, b in pairwise(edges))

    def network_of(self, steps: int) -> tuple[int, ...]:
        """All step counts of the network that serves this one, the last halving's last."""
        return next(network for network in self.networks if steps in network)

    @property
    def first_shares(self) -> tuple[float, ...]:
        """Share of each halving's rows that are on the grid of the first one."""
        rehearsed = self.weights == "shared"
        return tuple(
            (1 - halving.newest_share) / older * rehearsed if older else 1.0
            for older, halving in enumerate(self.halvings)
        )

    @model_validator(mode="after")
    def _chain(self) -> StageTwoSection:
        if not self.halvings and (self.sampler, self.weights) != ("deterministic", "separate"):
            raise ValueError("sampler and weights say nothing without halvings; leave them out")
        told = self.on_policy, self.lora, self.guided_share, self.first_target == "teacher"
        if not self.halvings and any(told):
            raise ValueError(
                "first_target, on_policy, guided_share and lora say nothing without halvings; leave them out"
            )
        if self.sampler == "stochastic" and self.steps[-1] == 1:
            raise ValueError("a stochastic chain ends at 2 steps: with 1 step both samplers are the same")
        if self.sampler == "stochastic" and self.weights == "shared":
            raise ValueError("weights can be shared in the deterministic chain only")
        if self.weights == "shared" and (self.guidance == "at_sampling" or self.on_policy or self.lora):
            raise ValueError("guidance: at_sampling, on_policy and lora need weights: separate")
        if self.guidance == "at_sampling" and (self.on_policy or self.lora or self.first_target == "teacher"):
            raise ValueError("guidance: at_sampling goes without first_target: teacher, on_policy and lora")
        said = next((name for halving in self.halvings if (name := halving.says_of_sharing)), None)
        if self.weights == "separate" and said is not None:
            raise ValueError(f"{said} is for weights: shared")
        if self.halvings and self.halvings[-1].keep:
            raise ValueError("keep says nothing of the last halving, whose network is kept anyway; leave it out")
        return self


class ConsistencySection(Training):
    """One network for a few step counts: each point of a grid is mapped to the end of the path through it.

    It serves the consistency sampler. source: the student of the chain that it starts from and whose steps it
    follows, by step count; or stage_one, in the chain's place. grid: points; a student has steps on its own grid
    only. students: the step counts that go into the bundle, each dividing grid. ema: of the targets, too. huber:
    RMS difference below which the loss is quadratic, above it grows linearly.
    """

    source: Annotated[int, Field(ge=2)] | Literal["stage_one"]
    grid: int = Field(ge=2)
    students: Annotated[tuple[int, ...], Once] = Field((4, 2, 1), min_length=1)
    ema: float | None = Field(0.95, gt=0, lt=1)
    huber: float = Field(1e-3, gt=0)
    unguided_share: float = Field(0.1, ge=0, lt=1)
    w_power: float = Field(0.5, ge=0)

    @model_validator(mode="after")
    def _on_its_grid(self) -> ConsistencySection:
        if self.source not in ("stage_one", self.grid):
            raise ValueError(f"grid must be {self.source}, that of the student it starts from")
        if off := [n for n in self.students if n < 1 or self.grid % n]:
            raise ValueError(f"students {off} do not divide grid {self.grid}")
        return self


class EncoderSection(ChainSection):
    """The halvings of the encoders: students that walk from an image to its noise.

    students: the step counts that go into the bundle. unguided_share: larger than of those that draw, since
    images are encoded with guidance off.
    """

    students: Annotated[tuple[int, ...], Once] = Field(min_length=1)
    unguided_share: float = Field(0.5, ge=0, lt=1)

    @model_validator(mode="after")
    def _keeps_what_it_trains(self) -> EncoderSection:
        if missing := sorted(set(self.students) - set(self.steps)):
            raise ValueError(f"students {missing} are not among its halvings")
        if said := next((name for halving in self.halvings if (name := halving.says_of_sharing)), None):
            raise ValueError(f"{said} is for weights: shared; every encoder has weights of its own")
        return self


class InpaintingSection(Section):
    """Networks that see a mask and the image behind it beside the latent. boxes, strokes: shares of the masks.

    The rest hides the whole image, so that the same network draws from text alone.
    """

    boxes: float = Field(0.4, ge=0, le=1)
    strokes: float = Field(0.4, ge=0, le=1)

    @model_validator(mode="after")
    def _leaves_some_whole(self) -> InpaintingSection:
        if self.boxes + self.strokes >= 1:
            raise ValueError("boxes and strokes must leave a share of masks that hide the whole image")
        return self


class ComputeSection(Section):
    """How the networks run; targets, losses, optimiser and weight average are float32 whatever stands here.

    precision: bf16 runs the networks under autocast. shard: split weights, gradients and optimiser over the
    processes (FSDP2), for networks that one device cannot hold. gradient_checkpointing: less memory, about a
    third more time.
    """

    precision: Literal["fp32", "bf16"] = "fp32"
    shard: bool = False
    gradient_checkpointing: bool = False


Solver = Literal["ddim", "dpm-solver++"]


class EvaluationSection(Section):
    """samples per (model, guidance, seed); teacher_steps: the reference teacher's step count.

    solvers: samplers of diffusers to run the teacher with, at each of solver_steps. features: the space in which
    distributions are compared; features_path: where inception (a TorchScript or ONNX file) or clip (a folder) is.
    """

    samples: int = Field(2000, ge=20)
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**20)], ...], Once] = Field((1, 2, 3), min_length=1)
    guidance_scales: Annotated[tuple[float, ...], Once] = Field((1.0, 2.0, 3.0, 4.0, 5.0), min_length=1)
    teacher_steps: int = Field(64, ge=1)
    batch_size: int = Field(250, ge=1)
    solvers: Annotated[tuple[Solver, ...], Once] = ()
    solver_steps: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Once] = Field((4, 8, 16), min_length=1)
    features: Literal["classifier", "inception", "clip"] = "classifier"
    features_path: str | None = None

    @model_validator(mode="after")
    def _features_are_somewhere(self) -> EvaluationSection:
        if (self.features == "classifier") != (self.features_path is None):
            raise ValueError("features_path goes with features: inception or clip, and they need it")
        if not self.solvers and self.solver_steps != EvaluationSection.model_fields["solver_steps"].default:
            raise ValueError("solver_steps are those of solvers, of which there are none")
        return self


class ExportSection(Section):
    """students: the step counts that go into the bundle; upscale: integer nearest-neighbour factor of decode.

    prompts: of a latent model, examples to show people; empty for those of any text model. weights: what the
    bundle keeps them in; float16 is half its size, and every engine computes in what it would anyway.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    description: str = ""
    students: Annotated[tuple[int, ...], Once] = (8, 4, 2, 1)
    default_steps: int = 4
    upscale: int = Field(8, ge=1)
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    weights: StoredWeights = "float32"
