"""A finished, evaluated run to a bundle: graphs checked against torch, tables, licences, one manifest."""

from __future__ import annotations

import copy
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
    PARITY_ROWS,
    STEP_LIMIT,
    parity_images,
    parity_latents,
    step_rows,
    write_at_sizes,
    write_checked,
)
from distill_jobs.pipelines.report import LatentReport
from distill_jobs.pipelines.surroundings import latent_surroundings
from distill_jobs.recipe import Recipe
from distill_jobs.report import JSON_NAME, Report, RunReport
from distill_jobs.run_folder import RunFolder
from distill_jobs.sections import StoredWeights
from distill_jobs.sizes import BundleSizes, Shape, halvings, sizes_of
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
    GuidanceRange,
    Latent,
    RecipeRecord,
    StudentSpec,
)
from engines.sampler import SamplerPlan

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
    sizes: Sequence[str] = (),
) -> Bundle:
    """Write the recipe's export.students and their evaluation as a bundle, replacing one at ``bundle_dir``.

    Nothing is written there unless every graph agrees with torch. despite_gates: write students that miss the
    report's targets all the same. decoder: which one the bundle decodes latents with. sizes: of images, as
    ``512x768``, the first for requests that name none; the trained one alone where left out.

    Raises: ExportError when a graph disagrees or gives NaN, a gate is missed, or the run has no evaluation of these
    weights; RecipeError when it has no such decoder or its networks take no such size; JobError when a network is
    missing.
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
    offered = _sizes(recipe, around, sizes)
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
        graphs = _write_graphs(staging, run, recipe, students, around, offered, advance)
        manifest = _manifest(staging, recipe, report, students, inverters, around, offered, graphs, decoder)
        return write_bundle(staging, bundle_dir, manifest)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _surroundings(run_dir: Path, recipe: Recipe, decoder: DecoderKind) -> Surroundings:
    if isinstance(recipe.teacher, LatentTeacher):
        return latent_surroundings(run_dir, recipe, decoder)
    if decoder == "tiny":
        raise ExportError(f"recipe {recipe.name} works on pixels: there is nothing to decode with a tiny decoder")
    return digits_surroundings(recipe)


def _sizes(recipe: Recipe, around: Surroundings, wanted: Sequence[str]) -> BundleSizes:
    if wanted and not isinstance(recipe.teacher, LatentTeacher):
        raise ExportError(f"recipe {recipe.name} works on pixels: it draws in the size it was trained for alone")
    return sizes_of(wanted, latent_shape(recipe), around.scale, halvings(recipe.unet))


def evaluation_of(run_dir: Path, recipe: Recipe) -> RunReport:
    """The evaluation of exactly a run's weights. Raises: ExportError where it is none; JobError."""
    if not (run_dir / JSON_NAME).is_file():
        raise ExportError(f"{run_dir} is not evaluated yet; run: python -m distill_jobs evaluate {run_dir}")
    kind = LatentReport if isinstance(recipe.teacher, LatentTeacher) else Report
    report: RunReport = kind.read(run_dir)
    again = f"run again: python -m distill_jobs evaluate {run_dir}"
    if report.weights != weights_of(run_dir, recipe, contenders(run_dir, recipe)):
        raise ExportError(f"the evaluation in {run_dir} is of other weights; {again}")
    if report.evaluated_sha256 != recipe.evaluated_sha256():
        raise ExportError(f"the evaluation in {run_dir} is of the recipe as it was before; {again}")
    return report


def _write_graphs(
    staging: Path,
    run: RunFolder,
    recipe: Recipe,
    students: list[Contender],
    around: Surroundings,
    sizes: BundleSizes,
    advance: Callable[[], None],
) -> dict[str, GraphSpec]:
    weights = recipe.export.weights
    graphs = write_surroundings(staging, sizes, around, advance, weights)

    def add(
        name: str, network: UNet2DConditionModel, plans: Sequence[SamplerPlan], guidance: GuidanceRange
    ) -> None:
        step = StepGraph(network, around.unpack)
        file = staging / f"{name}.onnx"
        graphs[name] = write_step(file, step, plans, guidance, around, sizes, STEP_LIMIT, weights)
        advance()

    for encoder in encoders(run.path, recipe):
        add(f"{ENCODER_GRAPH}_{encoder.steps}", encoder.load(), [encoder.plan(recipe)], recipe.guidance)
    of_graph: dict[str, list[Contender]] = {}
    for student in students:
        of_graph.setdefault(_graph(student, recipe), []).append(student)
    for name, served in of_graph.items():
        first = served[0]
        if _is_shared(first, recipe):
            network = load_stock(run.shared(recipe.stage_two.network_of(first.steps)[-1]))
        else:
            network = first.load()
        add(name, network, [student.plan(recipe) for student in served], recipe.served)
    return graphs


def write_step(
    file: Path,
    step: StepGraph,
    plans: Sequence[SamplerPlan],
    guidance: GuidanceRange,
    around: Surroundings,
    sizes: BundleSizes,
    limit: float,
    weights: StoredWeights = "float32",
) -> GraphSpec:
    """A step graph that serves these plans. limit: of absolute error; weights: what its file keeps them in."""

    def rows_of(shape: Shape) -> list[Tensor]:
        return step_rows(step, plans, guidance, around.conditions, shape, around.scale)

    specs = step.inputs(*sizes.axes, tokens=around.conditions.shape[1]), step.outputs(*sizes.axes)
    return write_at_sizes(step, rows_of, sizes, specs, file, limit, weights)


def write_surroundings(
    staging: Path,
    sizes: BundleSizes,
    around: Surroundings,
    advance: Callable[[], None],
    weights: StoredWeights = "float32",
) -> dict[str, GraphSpec]:
    """The graphs around the steps, and the tokenizer's file. weights: what the files keep them in."""
    condition, decode, encode = around.condition, around.decode, around.encode
    if weights == "float16":  # on an autoencoder of its own: rounding the decoder must not round the encoder
        decode = copy.deepcopy(decode)

    def latents_of(shape: Shape) -> list[Tensor]:
        return [parity_latents(PARITY_ROWS, shape)]

    def photos_of(shape: Shape) -> list[Tensor]:
        return [parity_images(PARITY_ROWS, encode.inputs(*shape[1:])[0].shape[1:])]

    closeness = CONDITION_LIMIT * float(around.conditions.abs().max())
    file, specs = staging / f"{CONDITION_GRAPH}.onnx", (condition.inputs(), condition.outputs())
    graphs = {CONDITION_GRAPH: write_checked(condition, [around.tokens], *specs, file, closeness, weights=weights)}
    advance()
    for name, module, rows_of, limit in (
        (DECODE_GRAPH, decode, latents_of, DECODE_LIMIT),
        (ENCODE_GRAPH, encode, photos_of, around.encode_limit),
    ):
        specs = module.inputs(*sizes.axes), module.outputs(*sizes.axes)
        graphs[name] = write_at_sizes(module, rows_of, sizes, specs, staging / f"{name}.onnx", limit, weights)
        advance()
    (staging / TOKENIZER_FILE).write_text(around.tokenizer, encoding="utf-8")
    return graphs


def _graph(student: Contender, recipe: Recipe) -> str:
    """The graph that a student's rows run in."""
    if student.name == CONSISTENCY:
        return CONSISTENCY_GRAPH
    section = recipe.stage_two
    if _is_shared(student, recipe) and len(section.networks) == 1:
        return SHARED_GRAPH
    return f"step_{'_'.join(map(str, section.network_of(student.steps)))}"


def _is_shared(student: Contender, recipe: Recipe) -> bool:
    """Whether its rows run in a network that is told its grid."""
    return student.name != CONSISTENCY and recipe.stage_two.weights == "shared"


def _student(student: Contender, recipe: Recipe) -> StudentSpec:
    return StudentSpec(
        steps=student.steps,
        sampler=student.sampler,
        graph=_graph(student, recipe),
        timesteps=student.plan(recipe).timesteps,
        grid=float(student.steps) if _is_shared(student, recipe) else None,
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
    sizes: BundleSizes,
    graphs: dict[str, GraphSpec],
    decoder: DecoderKind,
) -> BundleManifest:
    return BundleManifest(
        name=recipe.export.name,
        description=recipe.export.description,
        created=int(time.time()),
        tasks=("text_to_image", "edit", "inpaint"),
        prediction_type="v_prediction",
        schedule=recipe.schedule,
        clip=recipe.clip,
        guidance=recipe.served,
        latent=Latent(channels=sizes.channels, scaling_factor=around.scaling_factor),
        sizes=sizes.sizes,
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
