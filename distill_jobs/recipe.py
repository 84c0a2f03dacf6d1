"""Recipes: one frozen, validated model of a whole job, read from YAML and changed with ``--set key=value``."""

from __future__ import annotations

import hashlib
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from distill_jobs.errors import RecipeError
from engines.manifest import GuidanceRange
from engines.sampler import Sampler
from engines.schedule import ScheduleSpec


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


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


class TeacherSection(Training):
    condition_dropout: float = Field(0.1, gt=0, lt=1)


class StageOneSection(Training):
    """Folding guidance into one network.

    unguided_share: share of rows drawn at the range's lowest guidance exactly. w_power: each row's loss is
    divided by (1 + w)^w_power, since the target's scale grows with w. max_relative_error: gate on the
    relative v-error against true guidance, at several guidance scales, before any halving starts.
    """

    unguided_share: float = Field(0.1, ge=0, lt=1)
    w_power: float = Field(1.0, ge=0)
    max_relative_error: float = Field(0.1, gt=0)


class Halving(Section):
    """One student of stage two: its step count and how long it trains.

    newest_share: with shared weights, the share of rows on this grid; the others rehearse the grids before it.
    """

    steps: int = Field(ge=1)
    updates: int = Field(ge=1)
    newest_share: float = Field(0.5, gt=0, le=1)


class ChainSection(Section):
    """A chain of halvings, each starting from the one before; the first from the stage-one student."""

    halvings: tuple[Halving, ...] = Field(min_length=1)
    batch_size: int = Field(64, ge=1)
    accumulate: int = Field(1, ge=1)
    lr: float = Field(5e-4, gt=0)
    warmup: int = Field(20, ge=0)
    ema: float | None = Field(None, gt=0, lt=1)
    clip_norm: float = Field(1.0, gt=0)
    unguided_share: float = Field(0.1, ge=0, lt=1)
    w_power: float = Field(1.0, ge=0)

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
            lr=self.lr,
            warmup=self.warmup,
            anneal=True,
            ema=self.ema,
            clip_norm=self.clip_norm,
        )


class StageTwoSection(ChainSection):
    """The halvings of the students that draw.

    sampler: whose steps the students learn; they serve no other. weights: a network for every step count, or
    one for all of them that is told its grid.
    """

    sampler: Sampler = "deterministic"
    weights: Literal["separate", "shared"] = "separate"

    @model_validator(mode="after")
    def _chain(self) -> StageTwoSection:
        if self.sampler == "stochastic" and self.steps[-1] == 1:
            raise ValueError("a stochastic chain ends at 2 steps: with 1 step both samplers are the same")
        if self.sampler == "stochastic" and self.weights == "shared":
            raise ValueError("weights can be shared in the deterministic chain only")
        if self.weights == "separate" and any(
            h.newest_share != Halving.model_fields["newest_share"].default for h in self.halvings
        ):
            raise ValueError("newest_share is for weights: shared")
        return self


class EncoderSection(ChainSection):
    """The halvings of the encoders: students that walk from an image to its noise.

    students: the step counts that go into the bundle. unguided_share: larger than of those that draw, since
    images are encoded with guidance off.
    """

    students: tuple[int, ...] = Field(min_length=1)
    unguided_share: float = Field(0.5, ge=0, lt=1)

    @model_validator(mode="after")
    def _keeps_what_it_trains(self) -> EncoderSection:
        if missing := sorted(set(self.students) - set(self.steps)):
            raise ValueError(f"students {missing} are not among its halvings")
        if any(h.newest_share != Halving.model_fields["newest_share"].default for h in self.halvings):
            raise ValueError("newest_share is for weights: shared; every encoder has weights of its own")
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
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**20)], ...] = Field((1, 2, 3), min_length=1)
    guidance_scales: tuple[float, ...] = Field((1.0, 2.0, 3.0, 4.0, 5.0), min_length=1)
    teacher_steps: int = Field(64, ge=1)
    batch_size: int = Field(250, ge=1)
    solvers: tuple[Solver, ...] = ()
    solver_steps: tuple[Annotated[int, Field(ge=1)], ...] = Field((4, 8, 16), min_length=1)
    features: Literal["classifier", "inception", "clip"] = "classifier"
    features_path: str | None = None

    @model_validator(mode="after")
    def _features_are_somewhere(self) -> EvaluationSection:
        if (self.features == "classifier") != (self.features_path is None):
            raise ValueError("features_path goes with features: inception or clip, and they need it")
        return self


class ExportSection(Section):
    """students: the step counts that go into the bundle; upscale: integer nearest-neighbour factor of decode."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    description: str = ""
    students: tuple[int, ...] = (8, 4, 2, 1)
    default_steps: int = 4
    upscale: int = Field(8, ge=1)


class Recipe(Section):
    """A whole job: data, teacher, stage one, stage two, encoder (optional), evaluation, export.

    unet: the arguments of diffusers' UNet2DConditionModel, without time_cond_proj_dim.
    """

    name: str
    seed: int = Field(0, ge=0, lt=2**53)
    data: Literal["digits"]
    schedule: ScheduleSpec = ScheduleSpec()
    clip: float | None = Field(None, gt=0)
    guidance: GuidanceRange
    unet: dict[str, Any]
    teacher: TeacherSection
    stage_one: StageOneSection
    stage_two: StageTwoSection
    encoder: EncoderSection | None = None
    evaluation: EvaluationSection = EvaluationSection()
    export: ExportSection
    compute: ComputeSection = ComputeSection()
    checkpoint_every: int = Field(200, ge=1, description="updates between checkpoints")
    log_every: int = Field(20, ge=1, description="updates between TensorBoard points")

    @model_validator(mode="after")
    def _exports_what_it_trains(self) -> Recipe:
        trained = {h.steps for h in self.stage_two.halvings}
        if missing := sorted(set(self.export.students) - trained):
            raise ValueError(f"export.students {missing} are not among stage_two.halvings")
        if self.export.default_steps not in self.export.students:
            raise ValueError("export.default_steps must be one of export.students")
        return self

    @model_validator(mode="after")
    def _shares_or_shards(self) -> Recipe:
        if self.compute.shard and self.stage_two.weights == "shared":
            raise ValueError("compute.shard cannot go with stage_two.weights: shared")
        return self

    @model_validator(mode="after")
    def _evaluates_what_it_trains(self) -> Recipe:
        evaluation, allowed = self.evaluation, self.guidance
        if outside := [s for s in evaluation.guidance_scales if not allowed.min <= s <= allowed.max]:
            raise ValueError(f"evaluation.guidance_scales {outside} are outside {allowed.min:g} to {allowed.max:g}")
        if len(set(evaluation.seeds)) < len(evaluation.seeds):
            raise ValueError("evaluation.seeds must differ from each other")
        finest = max(evaluation.teacher_steps, *(2 * chain.steps[0] for chain in self.chains))
        if finest > self.schedule.timesteps:
            raise ValueError(f"a grid of {finest} steps is finer than schedule.timesteps")
        return self

    @field_validator("unet")
    @classmethod
    def _digits_unet(cls, unet: dict[str, Any]) -> dict[str, Any]:
        """Only what the digits data needs is fixed; diffusers checks the rest when the network is built."""
        fixed = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "cross_attention_dim": 16}
        for name, value in fixed.items():
            if unet.get(name) != value:
                raise ValueError(f"unet.{name} must be {value} for data: digits")
        if "time_cond_proj_dim" in unet:
            raise ValueError("unet.time_cond_proj_dim is the student's and set by the job; leave it out")
        return unet

    @property
    def chains(self) -> tuple[ChainSection, ...]:
        """Its chains of halvings: that of stage two, and the encoders' where there are any."""
        return (self.stage_two,) if self.encoder is None else (self.stage_two, self.encoder)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def sha256(self) -> str:
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()


def read_recipe(source: str | Path, overrides: list[str] | None = None) -> Recipe:
    """A recipe by file path, or by the name of one shipped with halfstep, with ``key.sub=value`` overrides.

    Values are YAML. Raises: RecipeError naming the field.
    """
    data = _load(source)
    for override in overrides or []:
        _override(data, override)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "recipe"
        raise RecipeError(f"recipe {source}: {where}: {first['msg']}") from None


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with halfstep."""
    folder = resources.files("distill_jobs.recipes")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def changed_fields(old: Recipe, new: Recipe) -> list[str]:
    """Dotted names of the fields in which two recipes differ."""
    return _differences(old.model_dump(mode="json"), new.model_dump(mode="json"))


def _load(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if not path.is_file():
        shipped = resources.files("distill_jobs.recipes") / f"{source}.yaml"
        if not shipped.is_file():
            known = ", ".join(shipped_recipes())
            raise RecipeError(f"no recipe {str(source)!r}: give a YAML file or one of: {known}")
        text = shipped.read_text(encoding="utf-8")
    else:
        text = _read(path)
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {source} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {source} must be a YAML mapping")
    return data


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read as UTF-8 text: {error}") from None


def _override(data: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"--set takes key=value, not {override!r}")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"--set {key}: the value is not valid YAML") from None
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise RecipeError(f"--set {key}: {parent} is a value, not a section")
    data[last] = parsed


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(k for k in new if k not in old)]
        return [d for k in names for d in _differences(old.get(k), new.get(k), f"{prefix}{k}.")]
    return [] if old == new else [prefix.rstrip(".")]
