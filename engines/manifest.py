"""What ``manifest.json`` says: the frozen, validated description of a bundle, and the graph tensor names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from engines.sampler import Prediction, Sampler, SamplerPlan, encoder_plan, plan_through
from engines.schedule import NoiseSchedule, ScheduleSpec

FORMAT_VERSION: Final = 1
MANIFEST_NAME = "manifest.json"
NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9._-]{0,63}$"
SEAL_NAME = "manifest.sha256"
"""Holds the manifest's own hash, so that damage to it is found too: the manifest cannot list itself."""

# Graph tensor names: their one home. Shapes of the step graph's rows stand in the export.
LATENT = "latent"
TIMESTEP = "timestep"
GUIDANCE = "guidance"
CONDITION = "condition"
COEFFICIENTS = "coefficients"
NOISE = "noise"
KNOWN = "known"
MASKED = "masked"
MASK = "mask"
GRID = "grid"
TIME_IDS = "time_ids"
NEXT_LATENT = "next_latent"
CLEAN_ESTIMATE = "clean"
TOKENS = "tokens"
IMAGE = "image"

CONDITION_GRAPH = "condition"
DECODE_GRAPH = "decode"
ENCODE_GRAPH = "encode"
"""image: (B, H, W, 3) uint8 → latent: (B, C, h, w) float32, where editing and inpainting start from."""

FREE: Final = -1
"""In a shape: the batch, and height and width where a graph takes several sizes."""
MAX_SIZES: Final = 16

Task = Literal["text_to_image", "edit", "inpaint"]
DecoderKind = Literal["own", "tiny"]
DType = Literal["float32", "float16", "int64", "uint8"]
Lowered = Literal["bfloat16", "float16"]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorSpec(Frozen):
    """One graph input or output. shape: the first axis is the batch, written as -1.

    So are height and width of latents (B, C, -1, -1) and images (B, -1, -1, 3) that come in several sizes.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def free(self) -> bool:
        """Whether its rows come in several sizes."""
        return FREE in self.shape[1:]

    @model_validator(mode="after")
    def _free_in_both_or_none(self) -> TensorSpec:
        where = [axis for axis, length in enumerate(self.shape) if axis and length == FREE]
        if where and (len(self.shape) != 4 or where != ([1, 2] if self.name == IMAGE else [2, 3])):
            raise ValueError(f"{self.name} of shape {self.shape} leaves more or less free than height and width")
        return self


class Parity(Frozen):
    """Largest and mean absolute difference between the graph and what it was made from, on the same rows.

    reference: torch, or the float32 graph on an engine where this one is int8.
    """

    reference: str
    max_abs_error: float
    mean_abs_error: float
    rows: int


class GraphSpec(Frozen):
    """One ONNX file. dtype: the precision of the network body (inputs and updates stay float32).

    parity, lowered: over all sizes; parity_by_size: of each, where the graph takes several. lowered: by type, how
    far the network is from its float32 self with its products in that type, emulated when it was exported; null
    where it overflows, or comes near. Engines asked for float16 then run it in bfloat16. rounded: how far the
    outputs moved when weights were rounded to be kept in float16; null where they are kept in float32.
    """

    file: str
    dtype: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parity: Parity
    parity_by_size: dict[str, Parity] = {}
    lowered: dict[Lowered, Parity | None] = {}
    rounded: Parity | None = None

    @property
    def free(self) -> bool:
        """Whether its rows come in several sizes."""
        return any(tensor.free for tensor in (*self.inputs, *self.outputs))


class StudentSpec(Frozen):
    """What was trained: N steps of one sampler on one step graph.

    timesteps: the table indices at which the network is asked, noisiest first; an encoder's, cleanest first. They
    need not be the schedule's N-step grid: LCM's 4 steps are not. grid: value of the grid input, if it has one.
    """

    steps: int = Field(ge=1)
    sampler: Sampler = "deterministic"
    graph: str
    timesteps: tuple[int, ...]
    grid: float | None = None


class GuidanceRange(Frozen):
    """Public guidance_scale range the students were trained for."""

    min: float = Field(ge=1)
    max: float = Field(allow_inf_nan=False)
    default: float

    @model_validator(mode="after")
    def _ordered(self) -> GuidanceRange:
        if not self.min <= self.default <= self.max:
            raise ValueError("guidance needs min <= default <= max")
        return self


class Latent(Frozen):
    """What the steps denoise; scaling_factor is the VAE's (1 in pixel space)."""

    channels: int = Field(ge=1)
    scaling_factor: float = 1.0
    initial_std: float = Field(
        1.0, gt=0, description="standard deviation of the noise that drawing from text starts at"
    )


class Size(Frozen):
    """A size that images are drawn in: their pixels, and the latent they decode from."""

    width: int
    height: int
    latent_width: int
    latent_height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class ConditionSpec(Frozen):
    """The prompt side: tokenizer file and kind, and the shape (tokens, width) of one row's condition.

    examples: prompts of a text model to show people; empty for those that suit any.
    """

    kind: Literal["labels", "clip"]
    tokenizer: str
    tokens: int
    width: int
    examples: tuple[str, ...] = ()


class Measured(Frozen):
    """Mean over evaluation seeds and its spread (largest minus smallest)."""

    mean: float
    spread: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Measured:
        """Of one value a seed."""
        return cls(mean=sum(values) / len(values), spread=max(values) - min(values))


class EvaluationRow(Frozen):
    """One line of the quality table; every table holds the teacher's rows, from the same code and seeds."""

    model: str
    steps: int
    evaluations: int = Field(description="network evaluations per image; a guided teacher step counts two")
    sampler: Sampler = "deterministic"
    guidance_scale: float
    metrics: dict[str, Measured]


class Evaluation(Frozen):
    """metric: what ``frechet_distance`` measures, spelled out."""

    metric: str
    samples: int
    seeds: tuple[int, ...]
    rows: tuple[EvaluationRow, ...]


class RecipeRecord(Frozen):
    name: str
    sha256: str
    text: str


class Licences(Frozen):
    teacher: str
    data: str


class FileRecord(Frozen):
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class BundleManifest(Frozen):
    """Everything about a bundle that is not weights."""

    format_version: Literal[1] = FORMAT_VERSION
    name: str = Field(pattern=NAME_PATTERN)
    description: str = ""
    created: int = Field(description="seconds since 1970, when the bundle was written")
    tasks: tuple[Task, ...]
    prediction_type: Prediction
    schedule: ScheduleSpec
    clip: float | None = Field(None, description="bound on the clean estimate while sampling; null in latents")
    guidance: GuidanceRange
    latent: Latent
    sizes: tuple[Size, ...] = Field(min_length=1, max_length=MAX_SIZES, description="the first is the default")
    condition: ConditionSpec
    graphs: dict[str, GraphSpec]
    students: tuple[StudentSpec, ...] = Field(min_length=1)
    encoders: tuple[StudentSpec, ...] = Field((), description="students that invert an image to its noise")
    decoder: DecoderKind = Field("own", description="what decodes latents: the model's own, or a tiny one of it")
    default_steps: int
    evaluation: Evaluation
    tables: dict[str, tuple[EvaluationRow, ...]] = Field({}, description="quality besides ``evaluation``, by task")
    recipe: RecipeRecord
    licences: Licences
    files: dict[str, FileRecord]

    @field_validator("files")
    @classmethod
    def _plain_paths(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or str(path) != name or "\\" in name:
                raise ValueError(f"file path {name!r} must be plain and inside the bundle")
        return files

    @model_validator(mode="after")
    def _consistent(self) -> BundleManifest:
        needed = [CONDITION_GRAPH, DECODE_GRAPH, *(s.graph for s in (*self.students, *self.encoders))]
        if self.takes_images or any(MASKED in {spec.name for spec in g.inputs} for g in self.graphs.values()):
            needed.append(ENCODE_GRAPH)
        for name in needed:
            if name not in self.graphs:
                raise ValueError(f"graph {name!r} is needed but not described")
        for name in (self.condition.tokenizer, *(g.file for g in self.graphs.values())):
            if name not in self.files:
                raise ValueError(f"file {name!r} is used but not listed")
        self._check_sizes()
        for student in self.students:
            self._check_timesteps(student)
        for encoder in self.encoders:
            if self.inversion(encoder).timesteps != encoder.timesteps:
                raise ValueError(f"the timesteps of the {encoder.steps}-step encoder are not its schedule's grid")
        keys = [(s.steps, s.sampler) for s in self.students]
        if len(set(keys)) != len(keys) or self.default_steps not in {s.steps for s in self.students}:
            raise ValueError("students must be distinct in (steps, sampler) and include default_steps")
        return self

    def _check_timesteps(self, student: StudentSpec) -> None:
        which = f"the {student.steps}-step student"
        if len(student.timesteps) != student.steps:
            raise ValueError(f"{which} has {len(student.timesteps)} timesteps")
        try:
            self.plan(student)
        except ValueError as error:
            raise ValueError(f"{which}: {error}") from None

    def _check_sizes(self) -> None:
        scales = {
            divmod(pixels, cells)
            for size in self.sizes
            for pixels, cells in ((size.width, size.latent_width), (size.height, size.latent_height))
        }
        if len({str(size) for size in self.sizes}) != len(self.sizes):
            raise ValueError("sizes must be distinct")
        if len(scales) != 1 or scales.pop()[1] != 0:
            raise ValueError("sizes must have the same whole number of pixels for every position of a latent")
        fixed = (name for name, graph in self.graphs.items() if name != CONDITION_GRAPH and not graph.free)
        if len(self.sizes) > 1 and (name := next(fixed, None)):
            raise ValueError(f"graph {name!r} takes one size, and the bundle has {len(self.sizes)}")

    @property
    def sees_masks(self) -> bool:
        """Whether its networks see the mask and the image behind it; else inpainting blends at every step."""
        return any(spec.name == MASKED for student in self.students for spec in self.graphs[student.graph].inputs)

    @property
    def in_int8(self) -> bool:
        """Whether steps compute in int8, which engines round each in their own way."""
        return any(spec.dtype == "int8" for spec in self.graphs.values())

    @property
    def takes_images(self) -> bool:
        """Whether any of its tasks starts from a caller's image."""
        return bool({"edit", "inpaint"} & set(self.tasks))

    def plan(self, student: StudentSpec, start: int | None = None) -> SamplerPlan:
        """The coefficient rows of a student, optionally entered at the point ``start`` of its own, 1 … steps."""
        return _plan(self.schedule, student.timesteps, student.sampler, self.prediction_type, self.clip, start)

    def noise_level(self, timestep: int) -> tuple[float, float]:
        """(alpha, sigma) at a table index."""
        return _noise_schedule(self.schedule).at(timestep)

    def inversion(self, encoder: StudentSpec) -> SamplerPlan:
        """The coefficient rows of an encoder, from a clean latent to its noise."""
        return _inversion(self.schedule, encoder.steps, self.prediction_type)


@lru_cache(maxsize=16)
def _noise_schedule(spec: ScheduleSpec) -> NoiseSchedule:
    return NoiseSchedule(spec)


@lru_cache(maxsize=1024)
def _plan(
    spec: ScheduleSpec,
    timesteps: tuple[int, ...],
    sampler: Sampler,
    prediction: Prediction,
    clip: float | None,
    start: int | None,
) -> SamplerPlan:
    """One plan for all the rows that follow it: tabulating a schedule costs more than a small network's step."""
    return plan_through(_noise_schedule(spec), timesteps, sampler, prediction, clip, start)


@lru_cache(maxsize=64)
def _inversion(spec: ScheduleSpec, n: int, prediction: Prediction) -> SamplerPlan:
    return encoder_plan(_noise_schedule(spec), n, prediction)
