"""The digits recipe made so small that a whole job takes seconds: the same code, fewer and narrower updates."""

OVERRIDES = [
    "unet.block_out_channels=[8, 16]",
    "teacher={updates: 12, batch_size: 8, ema: 0.9}",
    "stage_one={updates: 8, batch_size: 8, ema: 0.9, max_relative_error: 10}",
    "stage_two.halvings=[{steps: 4, updates: 6}, {steps: 2, updates: 6}, {steps: 1, updates: 6}]",
    "stage_two.batch_size=8",
    "export.students=[4, 2, 1]",
    "evaluation={samples: 20, seeds: [1, 2], guidance_scales: [1.0, 4.0], teacher_steps: 8, batch_size: 20}",
    "checkpoint_every=5",
]
