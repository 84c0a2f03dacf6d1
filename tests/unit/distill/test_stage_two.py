"""The variants of stage two: one guidance, two networks, states of the student's own, adapters."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from rich.progress import Progress
from safetensors.torch import load_file
from torch import Tensor, nn

from distill_jobs import stage_two
from distill_jobs.adapters import FOLDER, Adapters, adapter_parameters, folded, with_adapters
from distill_jobs.contenders import contenders
from distill_jobs.data.digits import Digits, DigitsSource, class_condition
from distill_jobs.data.source import Condition
from distill_jobs.draws import Draw, Draws
from distill_jobs.job import run_job
from distill_jobs.loop import Trainer
from distill_jobs.objectives import Noisy, Tables, guided_v
from distill_jobs.phases import Phases
from distill_jobs.pipelines.drawing import LatentSampler
from distill_jobs.plan import plan_of
from distill_jobs.processes import Processes
from distill_jobs.recipe_file import read_recipe
from distill_jobs.rollout import Rollout
from distill_jobs.run_folder import RunFolder, training_seconds
from distill_jobs.sampling import sample
from distill_jobs.sections import ComputeSection, Solver
from distill_jobs.signals import StopSignal
from distill_jobs.state import Phase
from distill_jobs.student import load_stock, predict
from distill_jobs.taken import takeable
from engines.sampler import Sampler, sampler_plan
from engines.schedule import NoiseSchedule, ScheduleSpec
from tests.support.job_process import JobRun
from tests.support.tiny_recipe import OVERRIDES
from tests.support.tiny_run import tiny_student

B = 6
SCHEDULE = NoiseSchedule(ScheduleSpec())
QUIET = Progress(disable=True)
SHORT = [
    *OVERRIDES,
    "stage_two.halvings=[{steps: 4, updates: 6}, {steps: 2, updates: 6}]",
    "export={name: tiny, students: [4, 2], default_steps: 4}",
]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
VARIANTS = {
    "lora": "stage_two.lora={rank: 2}",
    "on-policy": "stage_two.on_policy=0.5",
    "of-the-teacher": "stage_two.first_target=teacher",
    "between": "guidance.log_snr_min=-2.0",
    "single": "stage_two.guidance=4.0",
    "two": "stage_two.guidance=at_sampling",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run without any variant; teacher and stage one are taken from it."""
    return run_job(
        read_recipe("digits", SHORT), tmp_path_factory.mktemp("plain") / "run", resume=False, progress=QUIET
    )


Variant = Callable[[str], RunFolder]


@pytest.fixture(scope="module")
def variant(plain: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    """A run of each variant, made when it is first asked for."""

    @cache
    def made(name: str) -> RunFolder:
        recipe, out = read_recipe("digits", [*SHORT, VARIANTS[name]]), tmp_path_factory.mktemp(name) / "run"
        return run_job(recipe, out, resume=False, progress=QUIET, taken_from=plain.path)

    return made


@pytest.fixture
def rows() -> Noisy:
    x, noise = torch.randn(2, B, 1, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    condition = class_condition(torch.arange(B))
    return Noisy(x, condition, class_condition(torch.full((B,), 10)), noise, torch.full((B,), 499))


# ---- adapters


def output(network: nn.Module, rows: Noisy) -> Tensor:
    with torch.no_grad():
        return predict(network, rows.x, rows.t, rows.condition, torch.linspace(0, 4, B))


def test_untrained_adapters_leave_the_network_as_it_is(rows: Noisy) -> None:
    base = tiny_student(0)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected = output(base, rows)
    adapted = with_adapters(base, 2).eval()
    assert torch.equal(output(adapted, rows), expected)
    after = folded(adapted).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_folded_adapters_are_the_network_under_them(rows: Noisy) -> None:
    adapted = with_adapters(tiny_student(0), 2).eval()
    expected = output(adapted, rows)
    generator = torch.Generator().manual_seed(0)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    torch.testing.assert_close(output(folded(adapted).eval(), rows), output(adapted, rows), rtol=1e-4, atol=1e-5)
    assert float((output(adapted, rows) - expected).abs().max()) > 1e-2
    assert sum(p.numel() for p in trained) == adapter_parameters(tiny_student(0), 2)


def test_adapters_are_small_files_that_diffusers_loads_over_stage_one(variant: Variant, rows: Noisy) -> None:
    lora = variant("lora")
    for n in (4, 2):
        student = lora.student(n)
        file = student / FOLDER / "pytorch_lora_weights.safetensors"
        assert file.stat().st_size < (student / WEIGHTS).stat().st_size
        network = load_stock(lora.stage_one)
        network.load_lora_adapter(str(file.parent), prefix=None, weight_name=file.name)
        torch.testing.assert_close(
            output(network.eval(), rows), output(load_stock(student), rows), rtol=1e-4, atol=1e-5
        )


def test_each_halving_goes_on_with_the_adapters_of_the_one_before(variant: Variant) -> None:
    lora = variant("lora")
    four = Adapters(2, lora.stage_one, lora.student(4)).start()
    kept = load_file(lora.student(4) / FOLDER / "pytorch_lora_weights.safetensors")
    state = four.state_dict()
    assert kept
    for name, tensor in kept.items():
        assert torch.equal(state[name.replace(".weight", ".default.weight")], tensor)
    assert all(p.requires_grad == (".lora_" in name) for name, p in four.named_parameters())
    base = load_stock(lora.stage_one).state_dict()
    assert torch.equal(state["conv_in.base_layer.weight"], base["conv_in.weight"])


def test_checkpoints_of_adapters_hold_no_frozen_weights(plain: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(plain.path, out)
    shutil.rmtree(out / "students")
    overrides = [*SHORT, VARIANTS["lora"]]
    (out / "recipe.yaml").write_text(read_recipe("digits", overrides).to_yaml(), encoding="utf-8")
    assert JobRun(out, overrides, terminated_at=2).exit_code() == 4
    [newest, *_] = sorted((out / "checkpoints" / "d4").glob("*/state.safetensors"), reverse=True)
    names = {name.removeprefix("network.") for name in load_file(newest) if name.startswith("network.")}
    assert names
    assert all(".lora_" in name for name in names)


# ---- states of the student's own


@pytest.mark.parametrize("sampler", ["deterministic", "stochastic"])
def test_a_rollout_stands_where_the_sampler_does(sampler: Sampler, rows: Noisy) -> None:
    """At point 0 only the last step is left: taking it ends where drawing does."""
    student, n, w = tiny_student(1), 4, torch.full((B,), 2.0)
    plan = sampler_plan(SCHEDULE, n, sampler)
    noise = [torch.randn(B, 1, 8, 8, generator=torch.Generator().manual_seed(k)) for k in range(n - 1)]
    arrived = Rollout(plan, 1.0).arrive(student, rows, torch.tensor([3, 2, 1, 0, 0, 3]), w, noise)
    z = rows.noise
    states = [z]
    with torch.no_grad():
        for position, step in enumerate(plan.steps[:-1]):
            v = predict(student, z, torch.full((B,), step.timestep), rows.condition, w)
            z, _ = step.apply(z, v, noise[position] if step.stochastic else 0.0)
            states.append(z)
    for row, point in enumerate([3, 2, 1, 0, 0, 3]):
        torch.testing.assert_close(arrived[row], states[n - 1 - point][row], rtol=0, atol=1e-5)


def test_only_the_drawn_share_of_rows_is_the_students_own(rows: Noisy) -> None:
    plan, draws = sampler_plan(SCHEDULE, 4), Draws(0, "d4")
    point, w = torch.tensor([0, 1, 2, 3, 0, 1]), torch.zeros(B)
    z_t = Rollout(plan, 0.5).replace(rows.x, tiny_student(1), draws, 3, rows, point, w)
    own = draws.stratified(3, B, Draw.POLICY) < 0.5
    assert int(own.sum()) == B // 2
    assert torch.equal(z_t[~own], rows.x[~own])
    assert bool((z_t[own] != rows.x[own]).flatten(1).any(1).all())


def test_without_a_share_there_is_no_rollout_and_the_bytes_are_those_of_the_plain_chain(
    plain: RunFolder, variant: Variant
) -> None:
    recipe = read_recipe("digits", [*SHORT, "stage_two.on_policy=0.0"])
    assert Rollout.of(recipe, recipe.stage_two, 4) is None
    assert takeable(recipe, plain).names == {"teacher", "stage_one", "d4", "d2"}
    own = variant("on-policy")
    assert (own.student(4) / WEIGHTS).read_bytes() != (plain.student(4) / WEIGHTS).read_bytes()


# ---- guidance in an interval


@pytest.mark.parametrize("solver", [None, "dpm-solver++"])
def test_a_teacher_is_guided_in_its_interval_alone(plain: RunFolder, solver: Solver | None) -> None:
    """By hand: 4 steps at 999, 749, 499 and 249, guided where the log-SNR is -2 and more, which 999 has not."""
    bounds = ["guidance.log_snr_min=-2.0", "evaluation.solvers=[dpm-solver++]", "evaluation.solver_steps=[4]"]
    recipe = read_recipe("digits", [*SHORT, *bounds])
    found = [
        c for c in contenders(plain.path, recipe) if c.role == "teacher" and c.steps == 4 and c.solver == solver
    ]
    (teacher,), unet, condition = found, load_stock(plain.teacher), class_condition(torch.tensor([3]))
    asked: list[tuple[int, int]] = []
    watched = unet.register_forward_pre_hook(lambda _, args: asked.append((len(args[0]), int(args[1][0]))))
    drawn = teacher.draw(teacher.network(unet, 4.0), recipe, condition, [5])
    watched.remove()
    per_step = Counter(t for _, t in asked)
    off = recipe.guidance.off(SCHEDULE)
    assert all(count == (1 if t in off else 2) for t, count in per_step.items())
    assert 0 < sum(t in off for t in per_step) < 4
    assert teacher.evaluations(4.0) == len(asked)
    assert teacher.evaluations(1.0) == 4
    assert teacher.limits(1.0) == ()
    assert teacher.limits(4.0) == tuple(t for t in per_step if t in off)
    if solver is None:
        guided, unguided = replace(teacher, unguided=()).network(unet, 4.0), teacher.network(unet, 1.0)

        def by_hand(x_t: Tensor, timestep: int, its: Condition) -> Tensor:
            return (unguided if timestep == 999 else guided)(x_t, timestep, its)

        assert torch.equal(drawn, sample(by_hand, teacher.plan(recipe), condition, [5], teacher.shape))


def test_what_is_kept_of_a_teacher_is_known_by_its_interval(plain: RunFolder) -> None:
    """Where it is guided at all; and nothing else is known otherwise than before there were intervals."""

    def fingerprint(scale: float, *bounds: str) -> str:
        recipe, known = read_recipe("digits", [*SHORT, *bounds]), list[str]()
        teacher = next(each for each in contenders(plain.path, recipe) if each.steps == 4)
        networks = SimpleNamespace(sha256=lambda _: "weights")
        kept = SimpleNamespace(latents=lambda _, fingerprint, __: known.append(fingerprint))
        null = class_condition(torch.tensor([10]))
        LatentSampler(recipe, networks, kept, null, null, None).draw(teacher, scale, 0)  # type: ignore[arg-type]
        return known[0]

    bound = "guidance.log_snr_min=-2"
    assert fingerprint(4.0) != fingerprint(4.0, bound)
    assert fingerprint(1.0) == fingerprint(1.0, bound)
    assert fingerprint(4.0) == fingerprint(4.0, "guidance.log_snr_max=90")


def test_a_teacher_guided_in_part_is_run_in_as_many_steps_as_cost_what_students_do(plain: RunFolder) -> None:
    """3 steps, at 999, 666 and 332, of which the second alone is guided from log-SNR -2 to 0.5."""
    bounds = ["guidance.log_snr_min=-2", "guidance.log_snr_max=0.5"]
    found = contenders(plain.path, read_recipe("digits", [*SHORT, *bounds]))
    costs = {each.steps: each.evaluations(4.0) for each in found if each.role == "teacher"}
    assert costs[3] == 4
    assert 3 not in {each.steps for each in contenders(plain.path, read_recipe("digits", SHORT))}


def test_a_first_halving_along_the_teacher_has_its_interval(plain: RunFolder, rows: Noisy, tmp_path: Path) -> None:
    recipe = read_recipe("digits", [*SHORT, VARIANTS["of-the-teacher"], VARIANTS["between"]])
    trainer = Trainer(Processes(ComputeSection(), tmp_path), tmp_path / "checkpoints", 5, 1, StopSignal(), QUIET)
    phases = Phases(recipe, plain, trainer, DigitsSource(Digits.load()))
    w, at = torch.full((B,), 2.0), replace(rows, t=torch.tensor([999, 999, 999, 499, 499, 249]))
    with torch.no_grad():
        v = stage_two._followed(phases, recipe.stage_two, plain.stage_one, first=True)(rows.x, at, w=w)
        guided = guided_v(
            load_stock(plain.teacher), Tables.of(SCHEDULE), rows.x, at, torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0, 2.0])
        )
    torch.testing.assert_close(v, guided, rtol=0, atol=1e-5)


def test_students_learn_the_interval_of_their_teacher(plain: RunFolder, variant: Variant) -> None:
    """The bounds reach training: stage one of the very same teacher is another."""
    between = variant("between")
    assert (between.stage_one / WEIGHTS).read_bytes() != (plain.stage_one / WEIGHTS).read_bytes()
    assert (between.teacher / WEIGHTS).read_bytes() == (plain.teacher / WEIGHTS).read_bytes()


# ---- one guidance, two networks


def test_a_single_guidance_chain_sees_that_guidance_alone(
    variant: Variant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[set[float]] = []
    train = Trainer.train

    def watched(self: Trainer, phase: Phase) -> object:
        rows = phase.loss(phase.network, phase.draws, 0, B)
        assert rows.w is not None
        seen.append(set(rows.w.tolist()))
        return train(self, phase)

    folder, recipe = variant("single"), read_recipe("digits", [*SHORT, VARIANTS["single"]])
    shutil.copytree(folder.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "students" / "d2")
    monkeypatch.setattr(Trainer, "train", watched)
    run_job(recipe, tmp_path / "run", resume=True, progress=QUIET)
    assert seen == [{3.0}]
    assert (recipe.served.min, recipe.served.max) == (4.0, 4.0)
    by_title = {c.title: c.scales_of(recipe.evaluation) for c in contenders(folder.path, recipe)}
    assert by_title == {"teacher": (1.0, 4.0), "stage one": (1.0, 4.0), "student": (4.0,)}


def test_two_networks_are_halved_from_the_teacher_each_on_its_own_condition(variant: Variant) -> None:
    two = variant("two")
    assert set(training_seconds(two)) == {"teacher", "d4", "d2", "u4", "u2"}
    assert not two.stage_one.exists()
    recipe = read_recipe("digits", [*SHORT, VARIANTS["two"]])
    [*_, student] = contenders(two.path, recipe)
    assert (student.title, student.steps, student.exported) == ("two networks", 2, False)
    assert [student.evaluations(scale) for scale in (1.0, 2.0)] == [2, 4]
    networks = [load_stock(two.student(2)), load_stock(two.unconditional(2))]
    assert all(network.config.time_cond_proj_dim is None for network in networks)
    label, seeds = class_condition(torch.tensor([3])), [5]
    got = student.draw(student.network(student.load(), 4.0), recipe, label, seeds)
    drawn = sample(guided_by_hand(networks, 3.0), student.plan(recipe), label, seeds, student.shape)
    torch.testing.assert_close(got, drawn, rtol=0, atol=1e-5)


def guided_by_hand(networks: list[UNet2DConditionModel], w: float):
    def network(x_t: Tensor, timestep: int, condition: object) -> Tensor:
        t, empty = torch.full((len(x_t),), float(timestep)), class_condition(torch.tensor([10]))
        conditional, unconditional = predict(networks[0], x_t, t, condition), predict(networks[1], x_t, t, empty)  # type: ignore[arg-type]
        return (1 + w) * conditional - w * unconditional

    return network


@pytest.mark.parametrize("name", VARIANTS)
def test_a_killed_variant_ends_in_the_same_bytes(name: str, variant: Variant, tmp_path: Path) -> None:
    whole, out = variant(name), tmp_path / "killed"
    shutil.copytree(whole.path, out)
    shutil.rmtree(out / "students")
    overrides = [*SHORT, VARIANTS[name]]
    assert JobRun(out, overrides, dies_at=30).exit_code() == -9
    assert JobRun(out, overrides).exit_code() == 0
    for n in (4, 2):
        assert (out / f"students/d{n}" / WEIGHTS).read_bytes() == (whole.student(n) / WEIGHTS).read_bytes()


# ---- whose steps the first halving learns


@pytest.mark.parametrize("weights", ["separate", "shared"])
def test_only_the_first_halving_may_learn_from_the_teacher(
    weights: str, plain: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage one that nothing is learned from is not even loaded to be followed."""
    followed: list[str] = []
    own = Phases.frozen

    def frozen(self: Phases, folder: Path) -> nn.Module:
        followed.append(folder.name)
        return own(self, folder)

    monkeypatch.setattr(Phases, "frozen", frozen)
    overrides = [*SHORT, VARIANTS["of-the-teacher"], f"stage_two.weights={weights}"]
    run_job(read_recipe("digits", overrides), tmp_path / "run", resume=False, progress=QUIET, taken_from=plain.path)
    assert followed == (["teacher", "d4"] if weights == "separate" else ["teacher", "teacher"])


def test_a_student_of_the_teacher_is_another_than_one_of_stage_one(plain: RunFolder, variant: Variant) -> None:
    other = variant("of-the-teacher")
    for n in (4, 2):
        assert (other.student(n) / WEIGHTS).read_bytes() != (plain.student(n) / WEIGHTS).read_bytes()


# ---- what they cost


def test_the_plan_counts_the_variants() -> None:
    def phases(*overrides: str):
        return {phase.name: phase for phase in plan_of(read_recipe("digits", [*SHORT, *overrides])).phases}

    usual, own = phases(), phases(VARIANTS["on-policy"])
    assert own["d4"].frozen_passes == usual["d4"].frozen_passes + 0.5 * 3 / 2
    assert list(phases(VARIANTS["two"])) == ["teacher", "d4", "d2", "u4", "u2"]
    guided, off = phases(VARIANTS["of-the-teacher"]), read_recipe("digits", SHORT).stage_two.unguided_share
    assert guided["d4"].frozen_passes == usual["d4"].frozen_passes + 2 * (1 - off)
    assert guided["d2"].frozen_passes == usual["d2"].frozen_passes
    shared = "stage_two.weights=shared"
    rehearsed, anchored = phases(shared), phases(shared, VARIANTS["of-the-teacher"])
    assert anchored["d2"].frozen_passes == rehearsed["d2"].frozen_passes + 0.5 * 2 * (1 - off)
    lora = phases(VARIANTS["lora"])["d4"]
    assert lora.trained.parameters < usual["d4"].trained.parameters / 2
    assert lora.trained.flops == usual["d4"].trained.flops
    assert json.dumps(list(phases("consistency={source: 4, grid: 4, updates: 2}"))) == json.dumps(
        ["teacher", "stage_one", "d4", "d2", "consistency"]
    )
