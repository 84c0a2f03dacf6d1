"""A plan as the dry run prints it."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console
from rich.table import Table

from distill_jobs.costs import TEXT_TOKENS, cached_bytes
from distill_jobs.latent_sections import CaptionedData, FolderTeacher, GlyphData, MadeTeacher
from distill_jobs.plan import DEVICES, UTILISATION, Measured, Plan
from distill_jobs.recipe import Recipe

GIB, MEGA, TERA = 2**30, 1e6, 1e12


def print_plan(plan: Plan, measured: Measured | None, out: Path, console: Console) -> None:
    """Phases, memory, disk and time. ``out``: the run folder, for the free space of its disk."""
    compute = plan.recipe.compute
    phases = Table("phase", "updates", "batch", "parameters", "TFLOP an update", "seconds an update")
    for phase in plan.phases:
        seconds = measured.seconds.get(phase.name) if measured else None
        phases.add_row(
            phase.name,
            "taken" if phase.name in plan.taken else f"{phase.training.updates:,}",
            f"{phase.training.batch_size}",
            f"{phase.trained.parameters / 1e6:,.2f} M",
            f"{phase.flops(compute.gradient_checkpointing) / TERA:.3g}",
            "" if seconds is None else f"{seconds:.3g}",
        )
    console.print(phases)
    shared = "shared over the processes" if compute.shard else "in each process"
    memory = f"{plan.memory_bytes / GIB:.2f} GiB"
    console.print(f"memory: {memory} {shared}, and the activations of its rows", highlight=False)
    free = shutil.disk_usage(next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())).free
    console.print(f"disk: {plan.disk_bytes / GIB:.2f} GiB, free {free / GIB:.1f} GiB", highlight=False)
    data, teacher = plan.recipe.data, plan.recipe.teacher
    if isinstance(data, CaptionedData):
        tokens = teacher.text.tokens if isinstance(teacher, MadeTeacher) else TEXT_TOKENS
        each = cached_bytes(plan.recipe.unet, tokens) / MEGA
        console.print(f"latents: {each:.2g} MB an image of the data, in {data.cache}", highlight=False)
    if absent := _absent(plan.recipe):
        console.print(f"not there yet, and needed by the run: {', '.join(absent)}", style="yellow", highlight=False)
    for caution in plan.recipe.cautions:
        console.print(caution, style="yellow", highlight=False)
    if plan.disk_bytes > free:
        console.print(f"the disk of {out} is too small for this run", style="red")
    if measured:
        hours = measured.total(plan) / 3600
        console.print(f"time here: {hours:.2f} hours, from updates just run on this machine", highlight=False)
        return
    console.print(f"time: {plan.flops:.2e} FLOPs in all; at {UTILISATION:.0%} of the data sheet's bf16 rate:")
    for device, teraflops in DEVICES.items():
        hours = plan.flops / (teraflops * TERA * UTILISATION) / 3600
        console.print(f"  {device}: {hours:,.1f} GPU hours", highlight=False)
    if plan.recipe.compute.precision == "fp32":
        console.print(
            "compute.precision is fp32, which takes a GPU several times as long; bf16 is meant here", style="yellow"
        )
    console.print("evaluate runs after it, in fp32 on one device, and is not counted", highlight=False)


def _absent(recipe: Recipe) -> list[str]:
    """What the recipe names and the disk has not, but for patterns of shards and pictures yet to be drawn."""
    data, teacher, named = recipe.data, recipe.teacher, {}
    if isinstance(teacher, FolderTeacher):
        named["teacher.folder"] = teacher.folder
    if isinstance(data, CaptionedData) and not isinstance(data, GlyphData) and "{" not in data.path:
        named["data.path"] = Path(data.path)
    if recipe.evaluation.features_path is not None:
        named["evaluation.features_path"] = Path(recipe.evaluation.features_path)
    return [f"{path} ({field})" for field, path in named.items() if not path.exists()]
