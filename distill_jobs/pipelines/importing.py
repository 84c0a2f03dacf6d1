"""Published few-step students to bundles, without training: pipelines of the latent consistency kind.

Such a folder has a UNet that takes the guidance weight (``time_cond_proj_dim``) and an LCMScheduler. Its sampler is
our consistency sampler: the scheduler's boundary terms, at most 6e-8 of the latent, are left out.
Source: Luo et al. 2023, Latent Consistency Models; diffusers' LCMScheduler.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.progress import Progress

from distill_jobs.errors import TeacherError
from distill_jobs.export import write_surroundings
from distill_jobs.graphs import StepGraph
from distill_jobs.parity import STEP_LIMIT, shared_parity_rows, write_checked
from distill_jobs.pipelines.checks import open_folder
from distill_jobs.pipelines.folder import PipelineFolder
from distill_jobs.pipelines.packing import Packing
from distill_jobs.pipelines.surroundings import surroundings_of
from distill_jobs.pipelines.teacher import load_network
from distill_jobs.student import GUIDANCE_WIDTH
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
from engines.sampler import SamplerPlan, sampler_plan
from engines.schedule import NoiseSchedule

STEP_GRAPH = "step"


def import_student(
    path: Path,
    bundle_dir: Path,
    *,
    name: str,
    steps: Sequence[int],
    guidance: GuidanceRange,
    licence: str,
    progress: Progress,
) -> Bundle:
    """Write a bundle of a pipeline folder, replacing one at ``bundle_dir``.

    steps: step counts to serve, the first by default; the points of each grid must be among those that the model
    was trained at. Raises: TeacherError saying why a folder cannot be served; ExportError.
    """
    check_replaceable(bundle_dir)
    folder = _lcm_folder(path)
    plans = {n: _plan(folder, n) for n in steps}
    around = surroundings_of(folder, Licences(teacher=licence, data="not stated"))
    staging = bundle_dir.with_name(f".{bundle_dir.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    task = progress.add_task("import", total=4, loss="")
    try:
        side = folder.size_px // folder.pixels_per_latent
        shape = (folder.channels, side, side)
        graphs = write_surroundings(staging, shape, around, lambda: progress.advance(task))
        graphs[STEP_GRAPH] = _step_graph(staging, folder, list(plans.values()), guidance, around)
        progress.advance(task)
        manifest = _manifest(staging, folder, name, plans, guidance, around, graphs)
        return write_bundle(staging, bundle_dir, manifest)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _lcm_folder(path: Path) -> PipelineFolder:
    """The folder, when it is of the kind that we run."""
    folder = open_folder(path)
    width = folder.config("unet").get("time_cond_proj_dim")
    if width != GUIDANCE_WIDTH:
        raise folder.wrong(
            f"its unet takes no guidance weight of {GUIDANCE_WIDTH} values (time_cond_proj_dim is {width}); "
            "of published students only the latent consistency kind can be imported"
        )
    if folder.class_of("scheduler") != "LCMScheduler":
        raise folder.wrong(f"its scheduler is {folder.class_of('scheduler')}; only LCMScheduler can be imported")
    if folder.extra_channels:
        raise folder.wrong("its unet sees a mask; such models cannot be imported")
    if folder.prediction == "sample":
        raise folder.wrong("it predicts the image; only epsilon and v_prediction can be imported")
    return folder


def _plan(folder: PipelineFolder, n: int) -> SamplerPlan:
    """The consistency sampler on n of the points that the model was trained at."""
    config, schedule = folder.config("scheduler"), NoiseSchedule(folder.schedule)
    apart = schedule.timesteps // int(config.get("original_inference_steps", 50))
    off = [k for k in schedule.grid(n)[1:] if (k + 1) % apart]
    if off:
        raise TeacherError(
            f"{folder.path}: {n} steps would use timestep {off[0]}, which the model was not trained at; "
            f"choose step counts that divide {schedule.timesteps // apart}"
        )
    return sampler_plan(schedule, n, "consistency", folder.prediction)


def _step_graph(
    staging: Path,
    folder: PipelineFolder,
    plans: Sequence[SamplerPlan],
    guidance: GuidanceRange,
    around: Surroundings,
) -> GraphSpec:
    side = folder.size_px // folder.pixels_per_latent
    graph = StepGraph(load_network(folder).requires_grad_(False), Packing.of(folder).unpack)
    *rows, _ = shared_parity_rows(plans, guidance, (folder.channels, side, side), around.conditions)
    inputs, outputs = graph.inputs(side, side, around.conditions.shape[1]), graph.outputs(side, side)
    # epsilon-prediction divides the network's error by alpha in the clean estimate
    gain = max(1.0, *(abs(step.coefficients.q) for plan in plans for step in plan))
    return write_checked(graph, rows, inputs, outputs, staging / f"{STEP_GRAPH}.onnx", STEP_LIMIT * gain)


def _manifest(
    staging: Path,
    folder: PipelineFolder,
    name: str,
    plans: dict[int, SamplerPlan],
    guidance: GuidanceRange,
    around: Surroundings,
    graphs: dict[str, GraphSpec],
) -> BundleManifest:
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
        latent=Latent(channels=folder.channels, scaling_factor=around.scaling_factor),
        sizes=(Size(width=side * scale, height=side * scale, latent_width=side, latent_height=side),),
        condition=around.spec,
        graphs=graphs,
        students=tuple(
            StudentSpec(steps=n, sampler="consistency", graph=STEP_GRAPH, timesteps=plan.timesteps)
            for n, plan in plans.items()
        ),
        default_steps=next(iter(plans)),
        evaluation=Evaluation(metric="none: imported, not measured", samples=0, seeds=(), rows=()),
        recipe=RecipeRecord(name="import", sha256=hashlib.sha256(text.encode()).hexdigest(), text=text),
        licences=around.licences,
        files=file_records(staging),
    )
