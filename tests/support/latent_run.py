"""A whole latent job made so small that it takes seconds: a tiny pipeline folder, a dozen images, few updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.support.captioned_images import image_folder

FINETUNE = {"updates": 2, "batch_size": 2, "target": "teacher"}
PROMPTED_UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [8],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "mid_block_type": None,
    "up_block_types": ["UpBlock2D"],
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
}
"""A network that is told the prompt with the timestep too, as a made pipeline's may be."""


def latent_recipe(work: Path, teacher: Path, *, finetune: bool = True, **changes: object) -> Path:
    """A recipe file, and the images that it names. changes: of its top-level fields."""
    if not (work / "images").exists():
        image_folder(work / "images", 12)
    recipe = {
        "name": "latent",
        "data": {"kind": "image_folder", "path": str(work / "images"), "cache": str(work / "cache")},
        "guidance": {"min": 1, "max": 10, "default": 5},
        "schedule": {"rescale_zero_terminal_snr": True} if finetune else None,
        "teacher": {
            "folder": str(teacher),
            "v_finetune": FINETUNE if finetune else None,
            "max_relative_error": 100,  # of weights that nobody trained
        },
        "stage_one": {"updates": 2, "batch_size": 4, "max_relative_error": 10},
        "stage_two": {"batch_size": 4, "halvings": [{"steps": n, "updates": 1} for n in (4, 2, 1)]},
        "evaluation": {"samples": 20, "seeds": [1], "guidance_scales": [1, 5], "teacher_steps": 8},
        "export": {"name": "latent", "students": [4, 1], "default_steps": 4},
        **changes,
    }
    file = work / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return file
