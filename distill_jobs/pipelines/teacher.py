"""A stock pipeline folder as a recipe's teacher: what the recipe takes from it, and the network it begins with."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel

from distill_jobs.errors import TeacherError
from distill_jobs.latent_sections import FolderTeacher
from distill_jobs.pipelines.checks import open_folder
from distill_jobs.pipelines.folder import PipelineFolder
from distill_jobs.pipelines.text import load_part
from distill_jobs.pipelines.writing import check_parts
from distill_jobs.recipe import Recipe
from engines.schedule import ScheduleSpec

RESCALE = "rescale_zero_terminal_snr"


def filled_from_teacher(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as read from YAML, with ``unet`` and ``schedule`` of its teacher's folder where it leaves them out.

    Fields of ``schedule`` that the recipe gives stay. A recipe that names no folder comes back as it is, and so
    does one that has its ``unet``: the folder need not be there to read it. Raises: TeacherError.
    """
    filled, teacher = dict(recipe), recipe.get("teacher")
    given = isinstance(teacher, Mapping) and teacher.get("folder")
    if not given or recipe.get("unet") is not None:
        return filled
    folder = _open(Path(str(given)))
    changed = recipe.get("schedule") or {}
    filled["unet"] = network_arguments(folder)
    filled["schedule"] = {**folder.schedule.model_dump(), **(changed if isinstance(changed, Mapping) else {})}
    return filled


def open_teacher(recipe: Recipe) -> PipelineFolder | None:
    """The folder that a recipe names, None where it names none. Raises: TeacherError naming what differs."""
    if not isinstance(recipe.teacher, FolderTeacher):
        return None
    folder = _open(recipe.teacher.folder)
    check_parts(folder)
    theirs, ours = _all_arguments(network_arguments(folder)), _all_arguments(recipe.unet)
    for name in sorted({*theirs, *ours}):
        if theirs.get(name) != ours.get(name):
            raise folder.wrong(
                f"its unet has {name}: {theirs.get(name)!r}, the recipe {ours.get(name)!r}; "
                "leave unet out of the recipe (--set unet=null) to take the folder's"
            )
    if _without_rescale(recipe.schedule) != _without_rescale(folder.schedule) or (
        folder.schedule.rescale_zero_terminal_snr and not recipe.schedule.rescale_zero_terminal_snr
    ):
        raise folder.wrong(
            f"its schedule is {folder.schedule.model_dump()}; a recipe may change {RESCALE} to true and no more; "
            f"--set unet=null --set 'schedule={{{RESCALE}: true}}' takes all else from the folder"
        )
    if recipe.teacher.v_finetune is None and (
        folder.prediction != "v_prediction" or recipe.schedule != folder.schedule
    ):
        raise folder.wrong(
            f"this teacher predicts {folder.prediction} and its schedule is {folder.schedule.kind}, rescaled "
            f"{folder.schedule.rescale_zero_terminal_snr}; students need v-prediction on the recipe's schedule: "
            "give teacher.v_finetune"
        )
    return folder


def load_network(folder: PipelineFolder) -> UNet2DConditionModel:
    """The folder's UNet in float32. Raises: TeacherError when weights are missing."""
    network = load_part(folder, "unet", UNet2DConditionModel)
    if not isinstance(network, UNet2DConditionModel):
        raise TeacherError(f"{folder.path}/unet is no UNet2DConditionModel")
    network.register_to_config(_name_or_path="")  # else where it was read from is part of what is written
    return network.requires_grad_(True)


def network_arguments(folder: PipelineFolder) -> dict[str, Any]:
    """The UNet's own arguments, those that are left at null not listed."""
    config = folder.config("unet")
    return {name: value for name, value in config.items() if not name.startswith("_") and value is not None}


def _open(path: Path) -> PipelineFolder:
    """A folder to be taught from. Raises: TeacherError, also of a student, which has no guidance to take over."""
    folder = open_folder(path)
    if folder.config("unet").get("time_cond_proj_dim") is not None:
        raise folder.wrong(
            "its unet takes the guidance weight (time_cond_proj_dim): it is distilled already; make a bundle of it "
            "with import, or give the model that it was distilled from"
        )
    return folder


def _all_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """With diffusers' defaults for those not given; as JSON has them, tuples being lists."""
    known = inspect.signature(UNet2DConditionModel.__init__).parameters.values()
    defaults = {each.name: each.default for each in known if each.default is not each.empty}
    found: dict[str, Any] = json.loads(json.dumps({**defaults, **given}))
    return found


def _without_rescale(schedule: ScheduleSpec) -> ScheduleSpec:
    return schedule.model_copy(update={RESCALE: False})
