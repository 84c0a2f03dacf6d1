"""A trained network back into a stock pipeline folder, beside its teacher's other parts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from distill_jobs.pipelines.folder import PipelineFolder, files_read

TRAINED = ("unet", "scheduler")


def complete(folder: Path, teacher: PipelineFolder) -> None:
    """Make a folder with ``unet/`` and ``scheduler/`` a whole pipeline with the teacher's other parts.

    Files are linked where the disk allows it, else copied; of weights only the safetensors that we read.
    """
    index = dict(teacher.index)
    for part in [
        name for name in index if teacher.class_of(name) not in ("missing", "None") and name not in TRAINED
    ]:
        _link(teacher.path / part, folder / part)
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model_index.json").write_text(text, encoding="utf-8")


def _link(source: Path, destination: Path) -> None:
    """A part's files, its weights under their plain name."""
    destination.mkdir(parents=True)
    for name, file in files_read(source).items():
        try:
            os.link(file, destination / name)
        except OSError:
            shutil.copyfile(file, destination / name)
