"""A finished, evaluated run to a bundle: graphs checked against torch, tables, licences, one manifest."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from diffusers import UNet2DConditionModel
from rich.progress import Progress
from torch import Tensor

from distill_jobs.contenders import CONSISTENCY, Contender, contenders, latent_shape
from distill_jobs.encoders import Encoder, encoders
from distill_jobs.graphs import StepGraph
from distill_jobs.latent_sections import LatentTeacher
from distill_jobs.onnx_export import ExportError
from distill_jobs.parity import (
    PARITY_BATCHES,
    PARITY_ROWS,
    STEP_LIMIT,
    parity_batches,
    parity_images,
    parity_latents,
    parity_rows,
    shared_parity_rows,
    write_checked,
)
from distill_jobs.pipelines.report import LatentReport
from distill_jobs.pipelines.surroundings import latent_surroundings
from distill_jobs.recipe import Recipe
from distill_jobs.report import JSON_NAME, Report, RunReport
from distill_jobs.run_folder import RunFolder
from distill_jobs.student import load_stock
from distill_jobs.surroundings import TOKENIZER_FILE, Surroundings, digits_surroundings
from distill_jobs.tasks import weights_of
from engines.bundle import Bundle, check_replaceable, file_records, write_bundle
from engines.manifest import (
    CONDITION_GRAPH,
    DECODE_GRAPH,
    ENCODE_GRAPH,
    BundleManifest,
    DecoderKind,
    GraphSpec,
    Latent,
    RecipeRecord,
    Size,
    StudentSpec,
)

SHARED_GRAPH = "step"
ENCODER_GRAPH = "invert"
SAMPLE_SHEET = "samples.png"
CONSISTENCY_GRAPH = "step_consistency"
CONDITION_LIMIT = 1e-5  # of its largest value
DECODE_LIMIT = 1.0  # grey levels


def export_run(
    run_dir: Path,
    bundle_dir: Path,
    recipe: Recipe,
    *,
    progress: Progress | None = None,
    despite_gates: bool = False,
    decoder: DecoderKind = "own",
) -> Bundle:
    """Write the recipe's export.students and their evaluation as a bundle, replacing one at ``bundle_dir``.

    Nothing is written there unless every graph agrees with torch. despite_gates: write students that miss the
    report's targets all the same. decoder: which one the bundle decodes latents with.

    Raises: ExportError when a graph disagrees or gives NaN, a gate is missed, or the run has no evaluation of these
    weights; RecipeError when it has no such decoder; JobError when a network is missing.
    """
    if recipe.stage_two.guidance == "at_sampling":
        raise ExportError("students of two networks, guided at sampling, are for comparison; a bundle has no place")
    check_replaceable(bundle_dir)
    everyone = contenders(run_dir, recipe)
    report = evaluation_of(run_dir, recipe)
    if (missed := [gate.name for gate in report.gates if not gate.passed]) and not despite_gates:
        raise ExportError(
            f"the report of {run_dir} misses {len(missed)} of its gates, first: {missed[0]}; "
            "train longer, or export all the same with --despite-gates"
        )
    around = _surroundings(run_dir, recipe, decoder)
    students, inverters = [c for c in everyone if c.exported], encoders(run_dir, recipe)
    display = progress or Progress(disable=True)
    step_graphs = len({_graph(student, recipe) for student in students}) + len(inverters)
    task = display.add_task("export", total=step_graphs + 3, loss="")
    staging = bundle_dir.with_name(f".{bundle_dir.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        run, advance = RunFolder(run_dir), lambda: display.advance(task)
        if run.sample_sheet.is_file():
            shutil.copyfile(run.sample_sheet, staging / SAMPLE_SHEET)
        graphs = _write_graphs(staging, run, recipe, students, around, advance)
        manifest = _manifest(staging, recipe, report, students, inverters, around, graphs, decoder)
        return write_bundle(staging, bundle_dir, manifest)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _surroundings(run_dir: Path, recipe: Recipe, decoder: DecoderKind) -> Surroundings:
    if isinstance(recipe.teacher, LatentTeacher):
        return latent_surroundings(run_dir, recipe, decoder)
    if decoder == "tiny":
        raise ExportError(f"recipe {recipe.name} works on pixels: there is nothing to decode with a tiny decoder")
    return digits_surroundings(recipe)


def evaluation_of(run_dir: Path, recipe: Recipe) -> RunReport:
    """The evaluation of exactly a run's weights. Raises: ExportError where it is none; JobError."""
    if not (run_dir / JSON_NAME).is_file():
        raise ExportError(f"{run_dir} is not evaluated yet; run: python -m distill_jobs evaluate {run_dir}")
    kind = LatentReport if isinstance(recipe.teacher, LatentTeacher) else Report
    report: RunReport = kind.read(run_dir)
    if (
        report.weights != weights_of(run_dir, recipe, contenders(run_dir, recipe))
        or report.recipe_sha256 != recipe.sha256()
    ):
        raise ExportError(
            f"the evaluation in {run_dir} is of other weights; run again: python -m distill_jobs evaluate {run_dir}"
        )
    return report


def _write_graphs(
    staging: Path,
    run: RunFolder,
    recipe: Recipe,
    students: list[Contender],
    around: Surroundings,
    advance: Callable[[], None],
) -> dict[str, GraphSpec]:
    shape = latent_shape(recipe)
    size, graphs = shape[1:], write_surroundings(staging, shape, around, advance)

    def add(name: str, network: UNet2DConditionModel, rows: list[Tensor]) -> None:
        step = StepGraph(network, around.unpack)
        inputs, outputs = step.inputs(*size, tokens=around.conditions.shape[1]), step.outputs(*size)
        file, batches = staging / f"{name}.onnx", parity_batches(*size)
        graphs[name] = write_checked(step, rows, inputs, outputs, file, STEP_LIMIT, batches)
        advance()

    for encoder in encoders(run.path, recipe):
        rows = parity_rows(encoder.plan(recipe), recipe.guidance, shape, around.conditions)
        add(f"{ENCODER_GRAPH}_{encoder.steps}", encoder.load(), rows)
    of_graph: dict[str, list[Contender]] = {}
    for student in students:
        of_graph.setdefault(_graph(student, recipe), []).append(student)
    for name, served in of_graph.items():
        plans = [student.plan(recipe) for student in served]
        rows = shared_parity_rows(plans, recipe.served, shape, around.conditions)
        if name == SHARED_GRAPH:
            add(name, load_stock(run.shared(recipe.stage_two.steps[-1])), rows)
        else:
            add(name, served[0].load(), rows[:-1])
    return graphs


def write_surroundings(
    staging: Path, shape: tuple[int, int, int], around: Surroundings, advance: Callable[[], None]
) -> dict[str, GraphSpec]:
    """The graphs around the steps, and the tokenizer's file. shape: (C, h, w) of a latent."""
    size, graphs = shape[1:], {}
    condition, decode, encode = around.condition, around.decode, around.encode
    closeness = CONDITION_LIMIT * float(around.conditions.abs().max())
    photos = parity_images(PARITY_ROWS, encode.inputs(*size)[0].shape[1:])
    latents = parity_latents(PARITY_ROWS, shape)
    for name, module, rows, inputs, outputs, limit in (
        (CONDITION_GRAPH, condition, around.tokens, condition.inputs(), condition.outputs(), closeness),
        (DECODE_GRAPH, decode, latents, decode.inputs(*size), decode.outputs(*size), DECODE_LIMIT),
        (ENCODE_GRAPH, encode, photos, encode.inputs(*size), encode.outputs(*size), around.encode_limit),
    ):
        batches = PARITY_BATCHES if name == CONDITION_GRAPH else parity_batches(*size)
        file = staging / f"{name}.onnx"
        graphs[name] = write_checked(module, [rows], inputs, outputs, file, limit, batches)
        advance()
    (staging / TOKENIZER_FILE).write_text(around.tokenizer, encoding="utf-8")
    return graphs


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
    report: RunReport,
    students: list[Contender],
    inverters: Sequence[Encoder],
    around: Surroundings,
    graphs: dict[str, GraphSpec],
    decoder: DecoderKind,
) -> BundleManifest:
    channels, height, width = latent_shape(recipe)
    scale = around.scale
    return BundleManifest(
        name=recipe.export.name,
        description=recipe.export.description,
        created=int(time.time()),
        tasks=("text_to_image", "edit", "inpaint"),
        prediction_type="v_prediction",
        schedule=recipe.schedule,
        clip=recipe.clip,
        guidance=recipe.served,
        latent=Latent(channels=channels, scaling_factor=around.scaling_factor),
        sizes=(Size(width=width * scale, height=height * scale, latent_width=width, latent_height=height),),
        condition=around.spec,
        graphs=graphs,
        students=tuple(_student(student, recipe) for student in students),
        encoders=tuple(_encoder(encoder, recipe) for encoder in inverters),
        decoder=decoder,
        default_steps=recipe.export.default_steps,
        evaluation=report.evaluation,
        tables=report.tasks,
        recipe=RecipeRecord(name=recipe.name, sha256=recipe.sha256(), text=recipe.to_yaml()),
        licences=around.licences,
        files=file_records(staging),
    )
