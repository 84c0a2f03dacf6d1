"""A run folder of tiny untrained networks: every file of a finished run, in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from distill_jobs.classifier import save_classifier, split_digits, train_classifier
from distill_jobs.data.digits import Digits
from distill_jobs.export import export_run
from distill_jobs.recipe import Recipe
from distill_jobs.student import Trained, new_teacher, save_stock, student_of
from engines.open import open_pipeline
from engines.pipeline import Pipeline
from engines.schedule import NoiseSchedule

UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "cross_attention_dim": 16,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": None,
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}
"""Each kind of layer, resampling included, and attention once: tracing and drawing take their time by layers."""

SHORT_UNET = {
    **UNET,
    "block_out_channels": [8],
    "down_block_types": ["CrossAttnDownBlock2D"],
    "up_block_types": ["UpBlock2D"],
}
"""Of half the layers, for tests of what is around a network."""


def tiny_recipe(students: tuple[int, ...] = (8, 4, 2, 1)) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "data": "digits",
            "guidance": {"min": 1, "max": 15, "default": 3},
            "unet": UNET,
            "teacher": {"updates": 1},
            "stage_one": {"updates": 1},
            "stage_two": {"halvings": [{"steps": n, "updates": 1} for n in students]},
            "evaluation": {
                "samples": 30,
                "seeds": [1, 2],
                "guidance_scales": [1, 2],
                "teacher_steps": 16,
                "batch_size": 20,
            },
            "export": {"name": "tiny", "students": students, "default_steps": students[-2]},
        }
    )


def tiny_student(seed: int, unet: dict[str, Any] | None = None) -> UNet2DConditionModel:
    """Untrained, but answering to w: cond_proj is random instead of zero."""
    student = student_of(new_teacher(unet or UNET, seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight = student.time_embedding.cond_proj.weight
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    return student.eval()


def write_tiny_run(folder: Path, recipe: Recipe) -> Path:
    schedule = NoiseSchedule(recipe.schedule)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    save_stock(folder / "teacher", new_teacher(recipe.unet, 0), schedule, recipe.clip)
    save_stock(folder / "stage_one", tiny_student(1, recipe.unet), schedule, recipe.clip)
    for halving in recipe.stage_two.halvings:
        student = tiny_student(2 + halving.steps, recipe.unet)
        trained = Trained(recipe.stage_two.sampler, (halving.steps,))
        save_stock(folder / "students" / f"d{halving.steps}", student, schedule, recipe.clip, trained)
    for n in recipe.encoder.steps if recipe.encoder else ():
        save_stock(folder / "encoders" / f"e{n}", tiny_student(100 + n, recipe.unet), schedule, recipe.clip)
    return folder


def write_judged_run(folder: Path, recipe: Recipe) -> Path:
    """A tiny run with a roughly trained classifier, which spares the full training."""
    run = write_tiny_run(folder, recipe)
    rough = train_classifier(split_digits(Digits.load())[0], epochs=2)
    save_classifier(rough, run / "classifier" / "classifier.safetensors")
    return run


def exported(run: Path, recipe: Recipe) -> Pipeline:
    """The run's bundle, gates or not, opened on the reference engine."""
    bundle = export_run(run, run.parent / "bundle", recipe, despite_gates=True)
    return open_pipeline(bundle.path, "onnxruntime", threads=1, rungs=(1, 4), warm=False)


def spoil(unet_folder: Path) -> None:
    """Put a NaN into saved weights."""
    unet = UNet2DConditionModel.from_pretrained(unet_folder)
    with torch.no_grad():
        unet.conv_out.bias.fill_(float("nan"))
    unet.save_pretrained(unet_folder)
