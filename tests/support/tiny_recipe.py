"""The digits recipe made so small that a whole job takes seconds: the same code, fewer updates of fewer layers."""

from pathlib import Path

OVERRIDES = [
    "unet.block_out_channels=[8]",
    "unet.down_block_types=[CrossAttnDownBlock2D]",
    "unet.mid_block_type=null",
    "unet.up_block_types=[UpBlock2D]",
    "teacher={updates: 12, batch_size: 8, ema: 0.9}",
    "stage_one={updates: 8, batch_size: 8, ema: 0.9, max_relative_error: 10}",
    "stage_two.halvings=[{steps: 4, updates: 6}, {steps: 2, updates: 6}, {steps: 1, updates: 6}]",
    "stage_two.batch_size=8",
    "export.students=[4, 2, 1]",
    "evaluation={samples: 20, seeds: [1, 2], guidance_scales: [1.0, 4.0], teacher_steps: 8, batch_size: 20}",
    "checkpoint_every=5",
]

PHASES = ("teacher", "stage_one", "students/d4", "students/d2", "students/d1")


def weights_of(run: Path) -> dict[str, bytes]:
    """The finished networks of a run folder, by phase."""
    return {p: (run / p / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() for p in PHASES}
