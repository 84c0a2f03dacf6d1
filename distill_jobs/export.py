"""A finished, evaluated run to a bundle: graphs checked against torch, tables, licences, one manifest."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor, nn

from distill_jobs.contenders import CONSISTENCY, Contender, contenders, latent_shape
from distill_jobs.data.digits import CLASSES, LICENCE, NAMES, WIDTH, class_condition
from distill_jobs.encoders import Encoder, encoders
from distill_jobs.graphs import ConditionGraph, DecodeGraph, EncodeGraph, StepGraph
from distill_jobs.onnx_export import ExportError, check_parity, reference_outputs, write_graph
from distill_jobs.recipe import Recipe
from distill_jobs.report import JSON_NAME, Report
from distill_jobs.run_folder import RunFolder
from distill_jobs.student import load_stock
from distill_jobs.tasks import task_weights
from engines.bundle import Bundle, check_replaceable, file_records, write_bundle
from engines.condition import LabelClass, LabelVocabulary
from engines.guidance import weight_from_scale
from engines.manifest import (
    CONDITION_GRAPH,
    DECODE_GRAPH,
    ENCODE_GRAPH,
    BundleManifest,
    ConditionSpec,
    GraphSpec,
    GuidanceRange,
    Latent,
    Licences,
    RecipeRecord,
    Size,
    StudentSpec,
    TensorSpec,
)
from engines.sampler import SamplerPlan

TOKENIZER_FILE = "tokenizer.json"
SHARED_GRAPH = "step"
ENCODER_GRAPH = "invert"
CONSISTENCY_GRAPH = "step_consistency"
STEP_LIMIT = 1e-4
DECODE_LIMIT = 1.0  # grey levels
ENCODE_LIMIT = 1e-5
PARITY_BATCHES = (1, 3, 8, 20)
PHRASES = (
    *("{}", "a {}", "an {}", "the {}", "digit {}", "a digit {}", "the digit {}", "number {}", "the number {}"),
    *("handwritten {}", "a handwritten {}", "handwritten digit {}", "a handwritten digit {}"),
    *("the handwritten digit {}", "a handwritten number {}", "a picture of {}", "a picture of a {}"),
    *("a picture of the digit {}", "an image of {}", "an image of the digit {}", "a drawing of {}"),
)


def export_run(
    run_dir: Path,
    bundle_dir: Path,
    recipe: Recipe,
    *,
    progress: Progress | None = None,
    despite_gates: bool = False,
) -> Bundle:
    """Write the recipe's export.students and their evaluation as a bundle, replacing one at ``bundle_dir``.

    Nothing is written there unless every graph agrees with torch. despite_gates: write students that miss the
    report's targets all the same. Raises: ExportError when a graph disagrees or gives NaN, a gate is missed, or
    the run has no evaluation of these weights; JobError when a network is missing.
    """
    if recipe.stage_two.guidance == "at_sampling":
        raise ExportError("students of two networks, guided at sampling, are for comparison; a bundle has no place")
    check_replaceable(bundle_dir)
    everyone = contenders(run_dir, recipe)
    report = _report(run_dir, recipe, everyone)
    if (missed := [gate.name for gate in report.gates if not gate.passed]) and not despite_gates:
        raise ExportError(
            f"the report of {run_dir} misses {len(missed)} of its gates, first: {missed[0]}; "
            "train longer, or export all the same with --despite-gates"
        )
    students, inverters = [c for c in everyone if c.exported], encoders(run_dir, recipe)
    display = progress or Progress(disable=True)
    step_graphs = len({_graph(student, recipe) for student in students}) + len(inverters)
    task = display.add_task("export", total=step_graphs + 3, loss="")
    staging = bundle_dir.with_name(f".{bundle_dir.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        graphs = _write_graphs(staging, RunFolder(run_dir), recipe, students, lambda: display.advance(task))
        (staging / TOKENIZER_FILE).write_text(vocabulary().model_dump_json(indent=1), encoding="utf-8")
        return write_bundle(staging, bundle_dir, _manifest(staging, recipe, report, students, inverters, graphs))
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def vocabulary() -> LabelVocabulary:
    """The prompts a digits model knows."""
    classes = tuple(LabelClass(name=name, aliases=(str(i),)) for i, name in enumerate(NAMES))
    return LabelVocabulary(classes=classes, templates=PHRASES)


def parity_rows(plan: SamplerPlan, guidance: GuidanceRange, shape: tuple[int, int, int], rows: int) -> list[Tensor]:
    """Random inputs of a step graph, in its order: the plan's steps in turn, w over the whole range.

    Every second row is inpainted under a random mask.
    """
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn((rows, *shape), generator=generator)

    steps = [plan.steps[i % len(plan)] for i in range(rows)]
    low, high = weight_from_scale(guidance.min), weight_from_scale(guidance.max)
    mask = torch.randint(0, 2, (rows, 1, *shape[1:]), generator=generator).float()
    mask[::2] = 1
    return [
        normal(),
        torch.tensor([float(step.timestep) for step in steps]),
        torch.linspace(low, high, rows)[torch.randperm(rows, generator=generator)],
        class_condition(torch.arange(rows) % CLASSES).tokens,
        torch.stack([torch.tensor(step.row) for step in steps]),
        normal(),
        normal(),
        mask,
    ]


def shared_parity_rows(
    plans: Sequence[SamplerPlan], guidance: GuidanceRange, shape: tuple[int, int, int], rows: int
) -> list[Tensor]:
    """Random inputs of one step graph that serves several plans, mixed in every batch; step counts are the last."""
    each = [parity_rows(plan, guidance, shape, rows) for plan in plans]
    chosen = [divmod(i, len(plans)) for i in range(rows)]
    mixed = [torch.stack([of_plans[which][at] for at, which in chosen]) for of_plans in zip(*each, strict=True)]
    return [*mixed, torch.tensor([float(len(plans[which])) for _, which in chosen])]


def write_checked(
    module: nn.Module,
    rows: list[Tensor],
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    path: Path,
    limit: float,
) -> GraphSpec:
    """One graph on disk and its description. rows: sum(PARITY_BATCHES) of them; limit: of absolute error."""
    expected = reference_outputs(module, rows, path.stem)
    write_graph(module, [tensor[:2] for tensor in rows], inputs, outputs, path)
    parity = check_parity(expected, path, rows, PARITY_BATCHES, limit)
    return GraphSpec(file=path.name, inputs=inputs, outputs=outputs, parity=parity)


def _report(run_dir: Path, recipe: Recipe, everyone: tuple[Contender, ...]) -> Report:
    """The evaluation of exactly these weights."""
    if not (run_dir / JSON_NAME).is_file():
        raise ExportError(f"{run_dir} is not evaluated yet; run: python -m distill_jobs evaluate {run_dir}")
    report = Report.read(run_dir)
    weights = {contender.key: contender.weights_sha256() for contender in everyone} | task_weights(run_dir, recipe)
    if report.weights != weights or report.recipe_sha256 != recipe.sha256():
        raise ExportError(
            f"the evaluation in {run_dir} is of other weights; run again: python -m distill_jobs evaluate {run_dir}"
        )
    return report


def _write_graphs(
    folder: Path, run: RunFolder, recipe: Recipe, students: list[Contender], advance: Callable[[], None]
) -> dict[str, GraphSpec]:
    channels, height, width = shape = latent_shape(recipe)
    count = sum(PARITY_BATCHES)
    tokens, images = torch.arange(count)[:, None] % CLASSES, parity_latents(count, shape)
    condition, decode = ConditionGraph(WIDTH), DecodeGraph(channels, recipe.export.upscale)
    at, size = folder / f"{CONDITION_GRAPH}.onnx", (height, width)
    graphs = {CONDITION_GRAPH: write_checked(condition, [tokens], condition.inputs(), condition.outputs(), at, 0.0)}
    advance()
    at = folder / f"{DECODE_GRAPH}.onnx"
    graphs[DECODE_GRAPH] = write_checked(
        decode, [images], decode.inputs(*size), decode.outputs(*size), at, DECODE_LIMIT
    )
    advance()
    encode = EncodeGraph(channels, recipe.export.upscale)
    at, photos = folder / f"{ENCODE_GRAPH}.onnx", parity_images(count, encode.inputs(*size)[0].shape[1:])
    graphs[ENCODE_GRAPH] = write_checked(
        encode, [photos], encode.inputs(*size), encode.outputs(*size), at, ENCODE_LIMIT
    )
    advance()

    def add(name: str, step: StepGraph, rows: list[Tensor]) -> None:
        inputs, outputs = step.inputs(*size, tokens=1), step.outputs(*size)
        graphs[name] = write_checked(step, rows, inputs, outputs, folder / f"{name}.onnx", STEP_LIMIT)
        advance()

    for encoder in encoders(run.path, recipe):
        rows = parity_rows(encoder.plan(recipe), recipe.guidance, shape, count)
        add(f"{ENCODER_GRAPH}_{encoder.steps}", StepGraph(encoder.load()), rows)
    of_graph: dict[str, list[Contender]] = {}
    for student in students:
        of_graph.setdefault(_graph(student, recipe), []).append(student)
    for name, served in of_graph.items():
        rows = shared_parity_rows([student.plan(recipe) for student in served], recipe.served, shape, count)
        if name == SHARED_GRAPH:
            add(name, StepGraph(load_stock(run.shared(recipe.stage_two.steps[-1]))), rows)
        else:
            add(name, StepGraph(served[0].load()), rows[:-1])
    return graphs


def parity_latents(rows: int, shape: tuple[int, int, int]) -> Tensor:
    """(rows, C, h, w) latents that reach beyond -1 … 1, for the decode graph."""
    return torch.randn((rows, *shape), generator=torch.Generator().manual_seed(1))


def parity_images(rows: int, shape: tuple[int, ...]) -> Tensor:
    """(rows, H, W, 3) uint8 images, for the encode graph. shape: (H, W, 3)."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (rows, *shape), generator=generator, dtype=torch.uint8)


def _graph(student: Contender, recipe: Recipe) -> str:
    """The graph that a student's rows run in."""
    if student.name == CONSISTENCY:
        return CONSISTENCY_GRAPH
    return SHARED_GRAPH if recipe.stage_two.weights == "shared" else f"step_{student.steps}"


def _student(student: Contender, recipe: Recipe) -> StudentSpec:
    graph = _graph(student, recipe)
    return StudentSpec(
        steps=student.steps,
        sampler=student.sampler,
        graph=graph,
        timesteps=student.plan(recipe).timesteps,
        grid=float(student.steps) if graph == SHARED_GRAPH else None,
    )


def _encoder(encoder: Encoder, recipe: Recipe) -> StudentSpec:
    timesteps = encoder.plan(recipe).timesteps
    return StudentSpec(steps=encoder.steps, graph=f"{ENCODER_GRAPH}_{encoder.steps}", timesteps=timesteps)


def _manifest(
    staging: Path,
    recipe: Recipe,
    report: Report,
    students: list[Contender],
    inverters: Sequence[Encoder],
    graphs: dict[str, GraphSpec],
) -> BundleManifest:
    channels, height, width = latent_shape(recipe)
    scale = recipe.export.upscale
    return BundleManifest(
        name=recipe.export.name,
        description=recipe.export.description,
        created=int(time.time()),
        tasks=("text_to_image", "edit", "inpaint"),
        prediction_type="v_prediction",
        schedule=recipe.schedule,
        clip=recipe.clip,
        guidance=recipe.served,
        latent=Latent(channels=channels),
        sizes=(Size(width=width * scale, height=height * scale, latent_width=width, latent_height=height),),
        condition=ConditionSpec(kind="labels", tokenizer=TOKENIZER_FILE, tokens=1, width=WIDTH),
        graphs=graphs,
        students=tuple(_student(student, recipe) for student in students),
        encoders=tuple(_encoder(encoder, recipe) for encoder in inverters),
        default_steps=recipe.export.default_steps,
        evaluation=report.evaluation,
        recipe=RecipeRecord(name=recipe.name, sha256=recipe.sha256(), text=recipe.to_yaml()),
        licences=Licences(teacher="Apache-2.0 (trained from scratch by this recipe)", data=LICENCE),
        files=file_records(staging),
    )
