"""The dry run counts without weights, measures where that takes seconds, and starts nothing."""

import io
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from distill_jobs.cli import app
from distill_jobs.errors import RecipeError
from distill_jobs.plan import Measured, NetworkCost, Plan, network_cost, plan_of
from distill_jobs.plan_page import print_plan
from distill_jobs.recipe_file import read_recipe
from distill_jobs.student import new_teacher, student_of
from tests.support import tiny_pipelines as tiny
from tests.support.latent_run import latent_recipe
from tests.support.tiny_recipe import OVERRIDES

LARGE = [("sd15", 859_520_964, 0.80), ("sd21", 865_910_724, 2.15), ("sdxl", 2_567_463_684, 6.8)]


@pytest.mark.parametrize(("name", "parameters", "teraflops"), LARGE, ids=[each[0] for each in LARGE])
def test_large_networks_are_counted_without_weights(name: str, parameters: int, teraflops: float) -> None:
    """The published sizes; FLOPs are two a multiply-add."""
    cost = network_cost(read_recipe(name).unet)
    assert cost.parameters == parameters
    assert cost.flops == pytest.approx(teraflops * 1e12, rel=0.02)


def test_a_folders_teacher_is_planned_without_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill_jobs.plan.network_cost", lambda config: NetworkCost(1, 1.0))
    tuned = plan_of(read_recipe("sd15"))
    assert [phase.name for phase in tuned.phases[:2]] == ["v_finetune", "stage_one"]
    assert not tuned.measurable(torch.device("cpu"))
    assert tuned.phases[0].frozen_passes == 0
    imitating = plan_of(read_recipe("sd15", ["teacher.v_finetune.target=teacher"]))
    assert imitating.phases[0].frozen_passes == 1
    as_it_is = plan_of(read_recipe("sd15", ["teacher.v_finetune=null"]))
    assert as_it_is.phases[0].name == "stage_one"


def test_a_plan_spares_the_evaluations_of_timesteps_without_guidance() -> None:
    """0.636 of the cosine schedule's timesteps are from log-SNR -2 to 3; a fifth of the rows is unguided anyhow."""
    (passes,) = (
        phase.frozen_passes
        for phase in plan_of(read_recipe("digits", ["guidance.log_snr_min=-2", "guidance.log_snr_max=3"])).phases
        if phase.name == "stage_one"
    )
    assert passes == pytest.approx(1 + 0.8 * 0.636, abs=1e-3)


def test_a_plan_counts_the_rows_that_a_halving_takes_where_there_is_guidance() -> None:
    told = ["guidance.log_snr_min=-2", "guidance.log_snr_max=3", "stage_two.first_target=teacher"]
    told += ["stage_two.guided_share=0.9", "stage_two.unguided_share=0.25"]
    first = next(p for p in plan_of(read_recipe("digits", told)).phases if p.name.startswith("d"))
    assert first.frozen_passes == pytest.approx(2 * (1 + 0.75 * 0.9))


@pytest.mark.parametrize(("name", "told"), [("sd15", "0.18 MB"), ("sdxl", "0.58 MB"), ("digits", None)])
def test_a_plan_says_what_cached_latents_take(
    name: str, told: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("distill_jobs.plan.network_cost", lambda *_: NetworkCost(1, 1.0))
    console = Console(file=io.StringIO(), width=200)
    print_plan(plan_of(read_recipe(name)), None, tmp_path, console)
    page = console.file.getvalue()  # type: ignore[attr-defined]
    assert (f"latents: {told} an image of the data, in runs/latents" in page) if told else "latents" not in page


def test_a_plan_says_what_it_names_and_the_disk_has_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("distill_jobs.plan.network_cost", lambda *_: NetworkCost(1, 1.0))
    folder, shards = f"teacher.folder={tmp_path}", "data={kind: webdataset, path: 'nowhere/{000..015}.tar'}"

    def page(*overrides: str) -> str:
        console = Console(file=io.StringIO(), width=200)
        print_plan(plan_of(read_recipe("sd15", list(overrides))), None, tmp_path, console)
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    told = "not there yet, and needed by the run: "
    assert f"{told}models/stable-diffusion-v1-5 (teacher.folder), data/images (data.path)\n" in page()
    assert f"{told}nowhere (data.path)\n" in page(folder, "data.path=nowhere")
    assert told not in page(folder, f"data.path={tmp_path}")
    assert told not in page(folder, shards)


@pytest.mark.parametrize(
    ("schedule", "students", "caution"),
    [
        ("{kind: scaled_linear}", "[4, 2]", "set schedule.rescale_zero_terminal_snr"),
        ("{kind: scaled_linear}", "[8, 4]", None),
        ("{kind: scaled_linear, rescale_zero_terminal_snr: true}", "[4, 2]", None),
        ("{kind: cosine}", "[4, 2]", None),
        ("{kind: cosine, log_snr_min: -9.0}", "[4, 2]", "leave schedule.log_snr_min out"),
    ],
)
def test_a_plan_cautions_of_few_steps_from_a_start_that_was_never_trained(
    schedule: str, students: str, caution: str | None, tmp_path: Path
) -> None:
    recipe = read_recipe("digits", [*OVERRIDES, f"schedule={schedule}"])
    export = recipe.export.model_copy(update={"students": yaml.safe_load(students)})
    recipe = recipe.model_copy(update={"export": export})
    console = Console(file=io.StringIO(), width=400)
    print_plan(plan_of(recipe), None, tmp_path, console)
    page = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("where training never was" in page) == (caution is not None)
    assert caution is None or caution in page


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


def test_what_masks_leave_is_encoded_in_every_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 512 pixels by 1.1 TFLOP, more than a forward pass of the network."""
    monkeypatch.setattr("distill_jobs.plan.network_cost", lambda *_: NetworkCost(1, 1.0))
    plain, seeing = (plan_of(read_recipe(name)).phases for name in ("sd15", "sd15-inpaint"))
    for without, with_masks in zip(plain, seeing, strict=True):
        added = with_masks.flops(recomputed=True) - without.flops(recomputed=True)
        assert added == pytest.approx(256 * 1.1e12, rel=0.05)


def test_a_halving_that_was_not_measured_costs_what_the_measured_one_does() -> None:
    plan = plan_of(read_recipe("digits", OVERRIDES))
    assert Measured({"teacher": 1.0, "stage_one": 2.0, "d4": 3.0}).total(plan) == 12 * 1 + 8 * 2 + 18 * 3


def test_whole_networks_beside_what_is_trained_take_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(config: dict[str, object], rank: int = 0) -> NetworkCost:
        return NetworkCost(1 if rank else 1000, 1.0)

    monkeypatch.setattr("distill_jobs.plan.network_cost", count)
    plain, lora = (plan_of(read_recipe("sd15", [s])) for s in ("seed=0", "stage_two.lora={rank: 8}"))
    halvings = len(plain.recipe.stage_two.halvings)
    networks = [sum(phase.trained.parameters + phase.beside for phase in plan.phases) for plan in (plain, lora)]
    assert networks[1] - networks[0] == halvings, "as many whole students, and their adapters"
    shared = plan_of(read_recipe("digits-shared"))
    assert {phase.beside for phase in shared.phases if phase.name.startswith("d")} == {1000}
    tuned, as_it_is = (plan_of(read_recipe("sd15", s)) for s in ([], ["teacher.v_finetune=null"]))
    assert tuned.disk_bytes == as_it_is.disk_bytes, "the teacher is kept either way"


def test_only_small_recipes_are_measured() -> None:
    recipe = read_recipe("digits")
    assert plan_of(recipe).measurable(torch.device("cpu"))
    assert not plan_of(recipe.model_copy(update={"unet": read_recipe("sd15").unet})).measurable(torch.device("cpu"))


@pytest.mark.parametrize(
    "override",
    ["unet.block_out_channels=[33]", "unet.class_embed_type=timestep", "unet.attention_head_dim=0"],
    ids=["built", "run", "divided"],
)
def test_networks_that_diffusers_refuses_are_refused(override: str) -> None:
    with pytest.raises(RecipeError, match="diffusers refuses"):
        plan_of(read_recipe("sd15", [override]))


def test_a_dry_run_prints_plan_and_time_and_leaves_no_run(tmp_path: Path) -> None:
    sets = [part for override in OVERRIDES for part in ("--set", override)]
    out = tmp_path / "run"
    result = CliRunner().invoke(app, ["run", "digits", "--out", str(out), "--dry-run", *sets])
    assert result.exit_code == 0, result.output
    assert all(phase in result.output for phase in ("teacher", "stage_one", "d4", "d2", "d1"))
    assert "time here:" in result.output
    assert "free" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_build_for_gpus_on_a_machine_without_one_plans_for_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would measure updates that a GPU does in seconds."""
    asked: list[torch.device] = []
    monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(Plan, "measurable", lambda _, device: bool(asked.append(device)))
    result = CliRunner().invoke(app, ["run", "digits", "--out", str(tmp_path / "run"), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert asked == [torch.device("cpu")]


def test_a_dry_run_refuses_a_teacher_that_the_run_would_refuse(tmp_path: Path) -> None:
    tiny.sd(tmp_path / "parts", **tiny.ONE_LEVEL).save_pretrained(tmp_path / "teacher", safe_serialization=True)
    recipe = str(latent_recipe(tmp_path, tmp_path / "teacher"))
    assert CliRunner().invoke(app, ["run", recipe, "--dry-run"]).exit_code == 0
    refused = CliRunner().invoke(app, ["run", recipe, "--dry-run", "--set", "teacher.v_finetune=null"])
    assert refused.exit_code == 2
    assert "this teacher predicts epsilon" in refused.stderr
    assert "give teacher.v_finetune" in refused.stderr
