"""Published few-step students to bundles, without training: the graphs of a pipeline folder, and its manifest."""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.progress import Progress

from distill_jobs.errors import RecipeError
from distill_jobs.export import write_step, write_surroundings
from distill_jobs.graphs import StepGraph
from distill_jobs.parity import STEP_LIMIT
from distill_jobs.pipelines.published import Published, Scales, open_published
from distill_jobs.pipelines.surroundings import surroundings_of
from distill_jobs.pipelines.teacher import load_network
from distill_jobs.sections import StoredWeights
from distill_jobs.sizes import BundleSizes, halvings, sizes_of
from distill_jobs.surroundings import Surroundings
from engines.bundle import Bundle, check_replaceable, file_records, write_bundle
from engines.manifest import (
    NAME_PATTERN,
    BundleManifest,
    Evaluation,
    GraphSpec,
    GuidanceRange,
    Latent,
    Licences,
    RecipeRecord,
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
    scales: Scales,
    licence: str,
    progress: Progress,
    sizes: Sequence[str] = (),
    weights: StoredWeights = "float32",
) -> Bundle:
    """Write a bundle of a pipeline folder, replacing one at ``bundle_dir``.

    steps: step counts to serve, the first by default; scales: of guidance, as ``Published.guidance`` has it;
    sizes: as of ``export_run``; weights: what the files keep them in. Raises: TeacherError saying why a folder
    cannot be served exactly; RecipeError where its networks take no such size; ExportError.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise RecipeError(
            f"{name!r} is no model id: up to 64 of a-z, 0-9, dot, dash and underscore (import --name)"
        )
    check_replaceable(bundle_dir)
    published = open_published(path)
    folder, plans, served = published.folder, published.plans(steps), published.guidance(scales)
    network = load_network(folder).requires_grad_(False)
    around = surroundings_of(folder, Licences(teacher=licence, data="not stated"))
    side = folder.size_px // folder.pixels_per_latent
    trained = (folder.channels, side, side)
    offered = sizes_of(sizes, trained, around.scale, halvings(folder.config("unet")))
    staging = bundle_dir.with_name(f".{bundle_dir.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    task = progress.add_task("import", total=4, loss="")
    try:
        graphs = write_surroundings(staging, offered, around, lambda: progress.advance(task), weights)
        # epsilon-prediction divides the network's error by alpha in the clean estimate
        limit = STEP_LIMIT * max(1.0, *(abs(each.coefficients.q) for plan in plans.values() for each in plan))
        step, file = StepGraph(network, around.unpack), staging / f"{STEP_GRAPH}.onnx"
        graphs[STEP_GRAPH] = write_step(file, step, list(plans.values()), served, around, offered, limit, weights)
        progress.advance(task)
        manifest = _manifest(staging, published, name, plans, served, around, offered, graphs)
        return write_bundle(staging, bundle_dir, manifest)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _manifest(
    staging: Path,
    published: Published,
    name: str,
    plans: dict[int, SamplerPlan],
    guidance: GuidanceRange,
    around: Surroundings,
    sizes: BundleSizes,
    graphs: dict[str, GraphSpec],
) -> BundleManifest:
    folder = published.folder
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
        sizes=sizes.sizes,
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
