"""A few updates of every phase of the recipe on a network of true size, by the user's own command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from sklearn.datasets import load_sample_images

from tests.gpu.architectures import ARCHITECTURES
from tests.true_size import PHOTOS, RUN, TEACHER

UPDATES = 2
FOLDERS = {"v_finetune": "teacher", "stage_one": "stage_one", "d4": "students/d4"}
CAPTIONS = ("a temple behind trees", "a pink flower")


def make_photos(folder: Path) -> None:
    """Scikit-learn's two photographs, both halves of each, with captions."""
    folder.mkdir(parents=True)
    rows = []
    for pixels, caption in zip(load_sample_images().images, CAPTIONS, strict=True):
        whole = Image.fromarray(pixels)
        side = whole.height
        for left in (0, whole.width - side):
            name = f"{len(rows)}.png"
            whole.crop((left, 0, left + side, side)).save(folder / name)
            rows.append(json.dumps({"file_name": name, "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")


def job(work: Path, model: str) -> list[str]:
    """Arguments of the job: recipe sd15 with few updates of one row, and no weight average."""
    few = f"updates: {UPDATES}, batch_size: 1, accumulate: 1, lr: 1.0e-5, warmup: 0"
    unet = ARCHITECTURES[model].unet | {"sample_size": ARCHITECTURES[model].side}
    sets = {
        "data.path": work / PHOTOS,
        "data.cache": work / "latents",
        "teacher.folder": work / TEACHER,
        "teacher.max_relative_error": 100,  # its weights are random
        "teacher.v_finetune": f"{{{few}}}",
        "stage_one": f"{{{few}, max_relative_error: 1.0e9}}",
        "stage_two": f"{{batch_size: 1, accumulate: 1, lr: 1.0e-5, halvings: [{{steps: 4, updates: {UPDATES}}}]}}",
        "export.students": [4],
    }
    if model == "tiny":
        sets["unet"] = json.dumps(unet | {"in_channels": 4, "out_channels": 4})
    return [
        "run",
        "sd15",
        "--out",
        str(work / RUN),
        *(part for k, v in sets.items() for part in ("--set", f"{k}={v}")),
    ]


def phases(work: Path) -> dict[str, Any]:
    """Seconds an update of every phase, as the job measured them."""
    records = {name: json.loads((work / RUN / path / "phase.json").read_text()) for name, path in FOLDERS.items()}
    return {"update_s": {name: record["seconds"] / record["updates"] for name, record in records.items()}}
