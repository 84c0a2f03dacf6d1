"""Published few-step students to bundles, without training: the graphs of a pipeline folder, and its manifest."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from diffusers import UNet2DConditionModel
from rich.progress import Progress

from distill_jobs.export import write_surroundings
from distill_jobs.graphs import StepGraph, UnguidedStepGraph
from distill_jobs.parity import STEP_LIMIT, parity_batches, shared_parity_rows, write_checked
from distill_jobs.pipelines.packing import Packing
from distill_jobs.pipelines.published import Published, open_published
from distill_jobs.pipelines.surroundings import surroundings_of
from distill_jobs.pipelines.teacher import load_network
from distill_jobs.surroundings import Surroundings
from engines.bundle import Bundle, check_replaceable, file_records, write_bundle
from engines.manifest import (
    BundleManifest,
    Evaluation,
    GraphSpec,
    GuidanceRange,
    Latent,
    Licences,
    RecipeRecord,
    Size,
    StudentSpec,
)
from engines.sampler import SamplerPlan

STEP_GRAPH = "step"


def import_student(
    path: Path,
    bundle_dir: Path,
    *,
    name: str,
    steps: Sequence[int] | None,
    guidance: GuidanceRange | None,
    licence: str,
    progress: Progress,
) -> Bundle:
    """Write a bundle of a pipeline folder, replacing one at ``bundle_dir``.

    steps: step counts to serve, the first by default; guidance: the range to serve; None for what is usual, where
    there is such. Raises: TeacherError saying why a folder cannot be served exactly; ExportError.
    """
    check_replaceable(bundle_dir)
    published = open_published(path)
    folder, plans, served = published.folder, published.plans(steps), published.guidance(guidance)
    network = load_network(folder).requires_grad_(False)
    around = surroundings_of(folder, Licences(teacher=licence, data="not stated"))
    staging = bundle_dir.with_name(f".{bundle_dir.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    task = progress.add_task("import", total=4, loss="")
    try:
        side = folder.size_px // folder.pixels_per_latent
        shape = (folder.channels, side, side)
        graphs = write_surroundings(staging, shape, around, lambda: progress.advance(task))
        graphs[STEP_GRAPH] = _step_graph(staging, published, network, list(plans.values()), served, around)
        progress.advance(task)
        manifest = _manifest(staging, published, name, plans, served, around, graphs)
        return write_bundle(staging, bundle_dir, manifest)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _step_graph(
    staging: Path,
    published: Published,
    network: UNet2DConditionModel,
    plans: Sequence[SamplerPlan],
    guidance: GuidanceRange,
    around: Surroundings,
) -> GraphSpec:
    folder = published.folder
    side = folder.size_px // folder.pixels_per_latent
    step = StepGraph(network, Packing.of(folder).unpack)
    latent, timestep, w, *others, _ = shared_parity_rows(
        plans, guidance, (folder.channels, side, side), around.conditions
    )
    inputs, outputs = step.inputs(side, side, around.conditions.shape[1]), step.outputs(side, side)
    # epsilon-prediction divides the network's error by alpha in the clean estimate
    limit = STEP_LIMIT * max(1.0, *(abs(each.coefficients.q) for plan in plans for each in plan))
    file = staging / f"{STEP_GRAPH}.onnx"
    batches = parity_batches(side, side)
    if published.guided:
        return write_checked(step, [latent, timestep, w, *others], inputs, outputs, file, limit, batches)
    return write_checked(
        UnguidedStepGraph(step), [latent, timestep, *others], inputs, outputs, file, limit, batches
    )


def _manifest(
    staging: Path,
    published: Published,
    name: str,
    plans: dict[int, SamplerPlan],
    guidance: GuidanceRange,
    around: Surroundings,
    graphs: dict[str, GraphSpec],
) -> BundleManifest:
    folder = published.folder
    side, scale = folder.size_px // folder.pixels_per_latent, around.scale
    text = yaml.safe_dump(
        {"imported": folder.path.name, "steps": list(plans), "scheduler": folder.config("scheduler")}
    )
    return BundleManifest(
        name=name,
        description=f"Imported from the pipeline folder {folder.path.name}",
        created=int(time.time()),
        tasks=("text_to_image", "edit", "inpaint"),
        prediction_type=folder.prediction,
        schedule=folder.schedule,
        guidance=guidance,
        latent=Latent(
            channels=folder.channels, scaling_factor=around.scaling_factor, initial_std=published.initial_std
        ),
        sizes=(Size(width=side * scale, height=side * scale, latent_width=side, latent_height=side),),
        condition=around.spec,
        graphs=graphs,
        students=tuple(
            StudentSpec(steps=n, sampler=plan.sampler, graph=STEP_GRAPH, timesteps=plan.timesteps)
            for n, plan in plans.items()
        ),
        default_steps=next(iter(plans)),
        evaluation=Evaluation(metric="none: imported, not measured", samples=0, seeds=(), rows=()),
        recipe=RecipeRecord(name="import", sha256=hashlib.sha256(text.encode()).hexdigest(), text=text),
        licences=around.licences,
        files=file_records(staging),
    )
