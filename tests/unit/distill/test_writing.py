"""Finished folders of a pipeline: its other parts stand on the run's disk once."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from distill_jobs.phases import Phases
from distill_jobs.pipelines.folder import PipelineFolder
from distill_jobs.processes import Processes
from distill_jobs.recipe_file import read_recipe
from distill_jobs.run_folder import RunFolder
from distill_jobs.sections import ComputeSection
from distill_jobs.student import new_teacher
from tests.support.tiny_recipe import OVERRIDES


def test_parts_of_a_teacher_on_another_disk_are_copied_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, link = tmp_path / "given", os.link
    (given / "text_encoder").mkdir(parents=True)
    (given / "text_encoder" / "model.safetensors").write_bytes(b"weights")

    def on_one_disk(source: str, destination: Path) -> None:
        if Path(source).is_relative_to(given.resolve()):
            raise OSError("Invalid cross-device link")
        link(source, destination)

    monkeypatch.setattr(os, "link", on_one_disk)
    index = {"text_encoder": ["transformers", "CLIPTextModel"], "unet": ["diffusers", "UNet2DConditionModel"]}
    trainer: Any = SimpleNamespace(processes=Processes(ComputeSection(), tmp_path))
    source: Any = None
    recipe, folder = read_recipe("digits", OVERRIDES), RunFolder(tmp_path / "run")
    phases = Phases(recipe, folder, trainer, source, PipelineFolder(given, "sd", index))
    for finished in (folder.teacher, folder.stage_one, folder.student(4)):
        phases.write(finished, new_teacher(recipe.unet, 0))
    parts = [
        f / "text_encoder" / "model.safetensors" for f in (folder.teacher, folder.stage_one, folder.student(4))
    ]
    assert {part.read_bytes() for part in parts} == {b"weights"}
    assert len({part.stat().st_ino for part in parts}) == 1
    assert (folder.stage_one / "model_index.json").read_bytes() == (
        folder.teacher / "model_index.json"
    ).read_bytes()
