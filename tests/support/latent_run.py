"""A whole latent job made so small that it takes seconds: a tiny pipeline folder, a dozen images, few updates."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.support.captioned_images import image_folder

FINETUNE = {"updates": 2, "batch_size": 2, "target": "teacher"}


def latent_recipe(work: Path, teacher: Path, *, finetune: bool = True, **changes: object) -> Path:
    """A recipe file, and the images that it names. changes: of its top-level fields."""
    if not (work / "images").exists():
        image_folder(work / "images", 12)
    recipe = {
        "name": "latent",
        "data": {"kind": "image_folder", "path": str(work / "images"), "cache": str(work / "cache")},
        "guidance": {"min": 1, "max": 10, "default": 5},
        "schedule": {"rescale_zero_terminal_snr": True} if finetune else None,
        "teacher": {"folder": str(teacher), "v_finetune": FINETUNE if finetune else None},
        "stage_one": {"updates": 2, "batch_size": 4, "max_relative_error": 10},
        "stage_two": {"batch_size": 4, "halvings": [{"steps": n, "updates": 1} for n in (4, 2, 1)]},
        "evaluation": {"samples": 20, "seeds": [1], "guidance_scales": [1, 5], "teacher_steps": 8},
        "export": {"name": "latent", "students": [4, 1], "default_steps": 4},
        **changes,
    }
    file = work / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return file
