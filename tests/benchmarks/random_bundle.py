"""A complete bundle of random weights, as large as a small real student: for speed, where quality is no matter.

A stock UNet2DConditionModel with 3 × 16 × 16 latents in pixel space, shown at 64 × 64, through the project's own
exporter and its parity check. Run: python -m tests.benchmarks.random_bundle DIR [--seed 0] [--shared] [--tiny]
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import UNet2DConditionModel

from distill_jobs.data.digits import CLASSES, WIDTH, class_condition
from distill_jobs.export import DECODE_LIMIT, SHARED_GRAPH
from distill_jobs.graphs import ConditionGraph, DecodeGraph, EncodeGraph, StepGraph
from distill_jobs.parity import (
    PARITY_BATCHES,
    STEP_LIMIT,
    parity_images,
    parity_latents,
    parity_rows,
    shared_parity_rows,
    write_checked,
)
from distill_jobs.student import GUIDANCE_WIDTH, new_teacher, student_of, told_its_grid
from distill_jobs.surroundings import TOKENIZER_FILE, vocabulary
from engines.bundle import Bundle, file_records, write_bundle
from engines.manifest import (
    CONDITION_GRAPH,
    DECODE_GRAPH,
    ENCODE_GRAPH,
    BundleManifest,
    ConditionSpec,
    Evaluation,
    GraphSpec,
    GuidanceRange,
    Latent,
    Licences,
    RecipeRecord,
    Size,
    StudentSpec,
)
from engines.sampler import SamplerPlan, sampler_plan
from engines.schedule import NoiseSchedule, ScheduleSpec

UPSCALE = 4
GUIDANCE = GuidanceRange(min=1.0, max=5.0, default=2.0)
COND_PROJ_STD = 0.05
SEPARATE_STEPS, SHARED_STEPS = (4, 1), (4, 8, 2, 1)
"""What the students of a bundle are trained for, the default first."""

UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [112, 208],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 8,
    "norm_num_groups": 16,
}
TINY_UNET: dict[str, Any] = {
    **UNET,
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "mid_block_type": None,
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
}


@dataclass(frozen=True)
class RandomOptions:
    """seed: of all weights; every student has its own, or one set is shared. unet: what diffusers takes."""

    seed: int = 0
    steps: tuple[int, ...] = SEPARATE_STEPS
    unet: Mapping[str, Any] = field(default_factory=lambda: UNET)
    shared: bool = False

    @classmethod
    def of(cls, manifest: BundleManifest) -> RandomOptions:
        """What a random bundle was made with."""
        return cls(
            seed=manifest.evaluation.seeds[0],
            steps=tuple(student.steps for student in manifest.students),
            unet=next(unet for unet in (UNET, TINY_UNET) if unet["sample_size"] == manifest.sizes[0].latent_width),
            shared=any(student.grid is not None for student in manifest.students),
        )

    @property
    def latent(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self.unet["in_channels"], self.unet["sample_size"], self.unet["sample_size"]


def random_student(options: RandomOptions, steps: int) -> UNet2DConditionModel:
    """The student of ``steps`` steps: the same weights at every call, and w matters to it."""
    student = student_of(new_teacher(dict(options.unet), options.seed + steps))
    generator = torch.Generator().manual_seed(options.seed + steps)
    weight = student.time_embedding.cond_proj.weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator) * COND_PROJ_STD)
    return student.eval()


def random_network(options: RandomOptions, steps: int) -> UNet2DConditionModel:
    """The network that draws in ``steps`` steps: its own student, or the one that is told its grid."""
    if not options.shared:
        return random_student(options, steps)
    shared = told_its_grid(random_student(options, options.steps[0]))
    weight = shared.time_embedding.cond_proj.weight
    generator = torch.Generator().manual_seed(options.seed)
    with torch.no_grad():
        columns = weight[:, GUIDANCE_WIDTH:]
        columns.copy_(torch.randn(columns.shape, generator=generator) * COND_PROJ_STD)
    return shared.eval()


def plan(steps: int) -> SamplerPlan:
    return sampler_plan(NoiseSchedule(ScheduleSpec()), steps)


def graph_name(steps: int, *, shared: bool = False) -> str:
    return SHARED_GRAPH if shared else f"step_{steps}"


def make_random_bundle(destination: Path, options: RandomOptions | None = None) -> Bundle:
    """Write and verify the bundle, replacing one at ``destination``. Raises: ExportError."""
    chosen = options or RandomOptions()
    destination.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".random-", dir=destination.parent))
    try:
        graphs = _write_graphs(staging, chosen)
        (staging / TOKENIZER_FILE).write_text(vocabulary().model_dump_json(indent=1), encoding="utf-8")
        return write_bundle(staging, destination, _manifest(staging, chosen, graphs))
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_graphs(folder: Path, options: RandomOptions) -> dict[str, GraphSpec]:
    channels, height, width = shape = options.latent
    count = sum(PARITY_BATCHES)
    condition, decode = ConditionGraph(WIDTH), DecodeGraph(channels, UPSCALE)
    tokens, latents = torch.arange(count)[:, None] % CLASSES, parity_latents(count, shape)
    conditions = class_condition(tokens[:, 0]).tokens
    at, size = folder / f"{CONDITION_GRAPH}.onnx", (height, width)
    graphs = {CONDITION_GRAPH: write_checked(condition, [tokens], condition.inputs(), condition.outputs(), at, 0.0)}
    at = folder / f"{DECODE_GRAPH}.onnx"
    specs = decode.inputs(*size), decode.outputs(*size)
    graphs[DECODE_GRAPH] = write_checked(decode, [latents], *specs, at, DECODE_LIMIT)
    encode = EncodeGraph(channels, UPSCALE)
    at, specs = folder / f"{ENCODE_GRAPH}.onnx", (encode.inputs(*size), encode.outputs(*size))
    images = parity_images(count, specs[0][0].shape[1:])
    graphs[ENCODE_GRAPH] = write_checked(encode, [images], *specs, at, 1e-5)
    for steps in options.steps[:1] if options.shared else options.steps:
        step, name = StepGraph(random_network(options, steps)), graph_name(steps, shared=options.shared)
        rows = parity_rows(plan(steps), GUIDANCE, shape, conditions)
        if options.shared:
            rows = shared_parity_rows([plan(n) for n in options.steps], GUIDANCE, shape, conditions)
        specs = step.inputs(*size, tokens=1), step.outputs(*size)
        graphs[name] = write_checked(step, rows, *specs, folder / f"{name}.onnx", STEP_LIMIT)
    return graphs


def _manifest(folder: Path, options: RandomOptions, graphs: dict[str, GraphSpec]) -> BundleManifest:
    channels, height, width = options.latent
    at = Size(width=width * UPSCALE, height=height * UPSCALE, latent_width=width, latent_height=height)
    return BundleManifest(
        name="random-shared" if options.shared else "random",
        description="Random weights, for measuring speed",
        created=0,
        tasks=("text_to_image", "edit", "inpaint"),
        prediction_type="v_prediction",
        schedule=ScheduleSpec(),
        guidance=GUIDANCE,
        latent=Latent(channels=channels),
        sizes=(at,),
        condition=ConditionSpec(kind="labels", tokenizer=TOKENIZER_FILE, tokens=1, width=WIDTH),
        graphs=graphs,
        students=tuple(
            StudentSpec(
                steps=n,
                graph=graph_name(n, shared=options.shared),
                timesteps=plan(n).timesteps,
                grid=float(n) if options.shared else None,
            )
            for n in options.steps
        ),
        default_steps=options.steps[0],
        evaluation=Evaluation(metric="none: random weights", samples=0, seeds=(options.seed,), rows=()),
        recipe=RecipeRecord(name="random", sha256="0" * 64, text=""),
        licences=Licences(teacher="none", data="none"),
        files=file_records(folder),
    )


def main(
    destination: Annotated[Path, typer.Argument(help="Folder of the bundle.", show_default=False)],
    seed: Annotated[int, typer.Option(min=0, help="Of the weights.")] = 0,
    shared: Annotated[bool, typer.Option("--shared", help="One set of weights for every step count.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="A toy size, to try the harness.")] = False,
) -> None:
    """Write a bundle of random weights."""
    steps, unet = SHARED_STEPS if shared else SEPARATE_STEPS, TINY_UNET if tiny else UNET
    options = RandomOptions(seed=seed, steps=steps, unet=unet, shared=shared)
    bundle = make_random_bundle(destination, options)
    megabytes = sum(record.bytes for record in bundle.manifest.files.values()) / 1e6
    typer.echo(f"{destination}: {megabytes:.0f} MB, students of {', '.join(map(str, options.steps))} steps")


if __name__ == "__main__":
    typer.run(main)
