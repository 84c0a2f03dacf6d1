"""A trained network back into a stock pipeline folder, beside its teacher's other parts."""

from __future__ import annotations

import json
from pathlib import Path

from distill_jobs.checkpoint import link_or_copy
from distill_jobs.pipelines.folder import PipelineFolder, files_read, read_json
from distill_jobs.student import SCHEDULER_CODE

TRAINED = ("unet", "scheduler")


def complete(folder: Path, teacher: PipelineFolder) -> None:
    """Make a folder with ``unet/`` and ``scheduler/`` a whole pipeline with the teacher's other parts.

    Files are linked where the disk allows it, else copied; of weights only the safetensors that we read.
    """
    index = dict(teacher.index)
    for part in (name for name in teacher.parts if name not in TRAINED):
        _link(teacher.path / part, folder / part)
    index["scheduler"] = _scheduler(folder / "scheduler")
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model_index.json").write_text(text, encoding="utf-8")


def _scheduler(part: Path) -> list[str]:
    """Module and class of a written scheduler: diffusers' own, or the one whose code stands beside its config."""
    module = SCHEDULER_CODE.stem if (part / SCHEDULER_CODE.name).is_file() else "diffusers"
    return [module, str(read_json(part / "scheduler_config.json")["_class_name"])]


def check_parts(teacher: PipelineFolder) -> None:
    """Refuse a folder that ``complete`` could not read, before anything is trained. Raises: TeacherError."""
    for part in teacher.parts:
        if not (teacher.path / part).is_dir():
            raise teacher.wrong(
                f"model_index.json lists {part}, whose folder is missing; put it there, or set it to [null, null]"
            )
        files_read(teacher.path / part)


def _link(source: Path, destination: Path) -> None:
    """A part's files, its weights under their plain name."""
    destination.mkdir(parents=True)
    for name, file in files_read(source).items():
        link_or_copy(file, destination / name)
