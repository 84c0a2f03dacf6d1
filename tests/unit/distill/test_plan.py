"""The dry run counts without weights, measures where that takes seconds, and starts nothing."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from distill_jobs.cli import app
from distill_jobs.errors import RecipeError
from distill_jobs.plan import Measured, network_cost, plan_of
from distill_jobs.recipe_file import read_recipe
from distill_jobs.student import new_teacher, student_of
from tests.support.tiny_recipe import OVERRIDES

SD15 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "block_out_channels": [320, 640, 1280, 1280],
    "attention_head_dim": 8,
}
SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "block_out_channels": [320, 640, 1280],
    "attention_head_dim": [5, 10, 20],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize(
    ("config", "parameters", "teraflops"),
    [(SD15, 859_520_964, 0.80), (SDXL, 2_567_463_684, 6.8)],
    ids=["sd15", "sdxl"],
)
def test_large_networks_are_counted_without_weights(
    config: dict[str, object], parameters: int, teraflops: float
) -> None:
    """The published sizes; FLOPs are two a multiply-add."""
    cost = network_cost(config)
    assert cost.parameters == parameters
    assert cost.flops == pytest.approx(teraflops * 1e12, rel=0.02)


def test_the_plan_counts_what_the_job_builds() -> None:
    recipe = read_recipe("digits", [*OVERRIDES, "stage_two.ema=null"])
    plan = plan_of(recipe)
    assert [phase.name for phase in plan.phases] == ["teacher", "stage_one", "d4", "d2", "d1"]
    teacher = new_teacher(recipe.unet, 0)
    counts = [sum(p.numel() for p in network.parameters()) for network in (teacher, student_of(teacher))]
    assert [plan.phases[0].trained.parameters, plan.phases[1].trained.parameters] == counts
    assert plan.phases[0].checkpoint_bytes == 4 * 4 * counts[0]
    assert plan.phases[2].checkpoint_bytes == 3 * 4 * counts[1]


def test_gradient_checkpointing_and_frozen_networks_cost_passes() -> None:
    teacher, stage_one, *_ = plan_of(read_recipe("digits", OVERRIDES)).phases
    one = teacher.trained.flops
    assert teacher.flops(recomputed=False) == pytest.approx(8 * 3 * one)
    assert teacher.flops(recomputed=True) == pytest.approx(8 * 4 * one)
    assert stage_one.flops(recomputed=False) == pytest.approx(8 * 5 * one, rel=0.05)


def test_a_halving_that_was_not_measured_costs_what_the_measured_one_does() -> None:
    plan = plan_of(read_recipe("digits", OVERRIDES))
    assert Measured({"teacher": 1.0, "stage_one": 2.0, "d4": 3.0}).total(plan) == 12 * 1 + 8 * 2 + 18 * 3


def test_only_small_recipes_are_measured() -> None:
    recipe = read_recipe("digits")
    assert plan_of(recipe).measurable(torch.device("cpu"))
    assert not plan_of(recipe.model_copy(update={"unet": SD15})).measurable(torch.device("cpu"))


def test_networks_that_diffusers_refuses_are_refused() -> None:
    with pytest.raises(RecipeError, match="diffusers refuses"):
        network_cost({**SD15, "attention_head_dim": [1, 2]})


def test_a_dry_run_prints_plan_and_time_and_leaves_no_run(tmp_path: Path) -> None:
    sets = [part for override in OVERRIDES for part in ("--set", override)]
    out = tmp_path / "run"
    result = CliRunner().invoke(app, ["run", "digits", "--out", str(out), "--dry-run", *sets])
    assert result.exit_code == 0, result.output
    assert all(phase in result.output for phase in ("teacher", "stage_one", "d4", "d2", "d1"))
    assert "time here:" in result.output
    assert "free" in result.output
    assert list(tmp_path.iterdir()) == []
