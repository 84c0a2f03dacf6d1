"""Recipes: what is wrong is named, what is overridden is used."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from distill_jobs.errors import RecipeError
from distill_jobs.latent_sections import FolderTeacher
from distill_jobs.recipe import Recipe
from distill_jobs.recipe_file import changed_fields, read_recipe, shipped_recipes
from distill_jobs.student import new_teacher
from engines.manifest import GuidanceRange
from engines.sampler import encoder_plan
from engines.schedule import NoiseSchedule


def test_every_shipped_recipe_is_valid_and_survives_its_own_yaml(tmp_path: Path) -> None:
    assert "digits" in shipped_recipes()
    for name in shipped_recipes():
        recipe = read_recipe(name)
        copy = tmp_path / f"{name}.yaml"
        copy.write_text(recipe.to_yaml(), encoding="utf-8")
        assert read_recipe(copy) == recipe
        assert read_recipe(copy).sha256() == recipe.sha256()


def test_overrides_reach_nested_fields_as_yaml_values() -> None:
    recipe = read_recipe(
        "digits",
        [
            "teacher.updates=7",
            "stage_two.halvings=[{steps: 1, updates: 3}]",
            "export.students=[1]",
            "export.default_steps=1",
        ],
    )
    assert recipe.teacher.updates == 7
    assert [h.steps for h in recipe.stage_two.halvings] == [1]


def test_an_override_begins_a_section_that_the_recipe_has_not(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("base: digits\nconsistency: null\n", encoding="utf-8")
    sets = ["consistency.source=4", "consistency.grid=4", "consistency.updates=3"]
    assert read_recipe(file, sets) == read_recipe("digits", sets)


def test_guidance_is_applied_between_its_bounds_and_is_served_without_them() -> None:
    recipe = read_recipe("digits", ["guidance.log_snr_min=-2", "guidance.log_snr_max=3"])
    schedule = NoiseSchedule(recipe.schedule)
    log_snr = [2 * math.log(a / s) if a else -math.inf for a, s in (schedule.at(t) for t in range(1000))]
    assert recipe.guidance.off(schedule) == {t for t in range(1000) if not -2 <= log_snr[t] <= 3}
    below_recipe = read_recipe("digits", ["guidance.log_snr_max=3"])
    assert below_recipe.guidance.off(schedule) == {t for t in range(1000) if log_snr[t] > 3}
    assert read_recipe("digits").guidance.off(schedule) == set()
    phrases = [each.interval for each in (recipe.guidance, below_recipe.guidance, read_recipe("digits").guidance)]
    assert phrases == ["from log-SNR -2 to 3", "up to log-SNR 3", ""]
    assert read_recipe("digits", ["guidance.log_snr_min=-2"]).guidance.interval == "from log-SNR -2"
    assert type(recipe.served) is GuidanceRange
    assert recipe.served == read_recipe("digits").served


@pytest.mark.parametrize(
    ("name", "at", "cleanest"),
    [
        ("digits", "stage_two", lambda schedule: schedule.grid(64)[63]),
        ("digits-stochastic", "stage_two", lambda schedule: schedule.grid(32)[31]),
        ("digits-encoder", "encoder", lambda schedule: encoder_plan(schedule, 64).steps[62].timestep),
    ],
)
def test_a_share_of_guided_rows_is_refused_where_all_steps_have_guidance(
    name: str, at: str, cleanest: Callable[[NoiseSchedule], int]
) -> None:
    """A lower bound leaves the noisiest step without guidance once it is above the cleanest point asked in it."""
    schedule = NoiseSchedule(read_recipe(name).schedule)
    alpha, sigma = schedule.at(cleanest(schedule))
    log_snr = 2 * math.log(alpha / sigma)
    for low in (log_snr - 2, log_snr - 1e-6):
        with pytest.raises(RecipeError, match="guided_share says nothing of a chain whose 32 steps"):
            read_recipe(name, [f"guidance.log_snr_min={low}", f"{at}.guided_share=0.7"])
    left_out = read_recipe(name, [f"guidance.log_snr_min={log_snr + 1e-6}", f"{at}.guided_share=0.7"])
    assert left_out.chains[-1].guided_share == 0.7


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("teacher.updates=0", "teacher.updates"),
        ("teacher.lrate=1", "teacher.lrate"),
        ("teacher.lr=.inf", "teacher.lr"),
        ("guidance.max=.inf", "guidance.max"),
        ("guidance.log_snr_min=.nan", "guidance.log_snr_min"),
        ("guidance.log_snr_min=50", "of a grid of [0-9]+ steps no timestep is between guidance.log_snr_min"),
        ("guidance={min: 1, max: 5, default: 3, log_snr_min: 1, log_snr_max: -1}", "no timestep is between"),
        ("guidance={min: 1, max: 5, default: 3, log_snr_min: 0.3, log_snr_max: 0.33}", "of a grid of 64 steps no"),
        ("stage_two.guided_share=0.7", "guided_share is for teachers guided in an interval"),
        ("stage_two.guided_share=1.0", "stage_two.guided_share"),
        ("stage_one.accumulate=3", "stage_one: .*accumulate 3"),
        ("stage_two.accumulate=1000", "stage_two: .*accumulate 1000"),
        ("teacher={updates: 1, updates: 2}", "not valid YAML"),
        ("stage_two.halvings=[{steps: 8, updates: 1}, {steps: 2, updates: 1}]", "must halve"),
        ("export.students=[3]", "export.students"),
        ("export.students=[4, 4, 1]", "export.students: 4 is given twice"),
        ("encoder={halvings: [{steps: 4, updates: 1}], students: [4, 4]}", "encoder.students: 4 is given twice"),
        ("export.default_steps=16", "default_steps"),
        ("guidance.default=9", "guidance"),
        ("stage_two.sampler=stochastic", "ends at 2 steps"),
        ("stage_two={weights: shared, sampler: stochastic, halvings: [{steps: 2, updates: 1}]}", "deterministic"),
        ("stage_two.halvings=[{steps: 1, updates: 1, newest_share: 0.9}]", "weights: shared"),
        ("stage_two.halvings=[{steps: 1, updates: 1, keep: true}]", "keep is for weights: shared"),
        ("stage_two={weights: shared, halvings: [{steps: 1, updates: 1, keep: true}]}", "of the last halving"),
        ("stage_two.halvings=[{steps: 1, updates: 1, lr: 0}]", "stage_two.halvings.0.lr"),
        ("stage_two.halvings=[]", "consistency.source"),
        ("stage_two.guidance=6.0", "stage_two.guidance 6"),
        ("stage_two.guidance=2.5", "must hold stage_two.guidance"),
        ("stage_two.guidance=sometimes", "stage_two.guidance"),
        ("stage_two.on_policy=1.5", "stage_two.on_policy"),
        ("stage_two.lora={rank: 0}", "stage_two.lora.rank"),
        (
            "stage_two={halvings: [], lora: {rank: 8}}",
            "on_policy, guided_share and lora say nothing without halvings",
        ),
        (
            "stage_two={halvings: [], on_policy: 0.5}",
            "on_policy, guided_share and lora say nothing without halvings",
        ),
        (
            "stage_two={halvings: [], first_target: teacher}",
            "first_target, on_policy, guided_share and lora say nothing without",
        ),
        ("unet.dropout=0.1", "unet: .*dropout must be 0"),
        ("consistency={source: 64, grid: 64, updates: 1}", "consistency.source 64"),
        ("consistency={source: 4, grid: 8, updates: 1}", "grid must be 4"),
        ("consistency={source: 4, grid: 4, updates: 1, students: [3]}", "do not divide"),
        ("consistency={source: 4, grid: 4, updates: 1, students: [2, 2]}", "2 is given twice"),
        ("schedule.kind=polynomial", "schedule.kind"),
        ("unet.sample_size=16", "unet.sample_size"),
        ("unet.time_cond_proj_dim=256", "time_cond_proj_dim"),
        ("evaluation.guidance_scales=[0.5]", "guidance_scales"),
        ("evaluation.guidance_scales=[]", "guidance_scales"),
        ("evaluation.guidance_scales=[1, 2, 1.0]", "evaluation.guidance_scales: 1.0 is given twice"),
        ("evaluation={solvers: [ddim, ddim]}", "evaluation.solvers: ddim is given twice"),
        ("evaluation.seeds=[1, 1]", "evaluation.seeds: 1 is given twice"),
        ("evaluation.seeds=[-1]", "evaluation.seeds"),
        ("evaluation.teacher_steps=2000", "schedule.timesteps"),
        ("clip=0", "clip"),
        ("seed=[1", "not valid YAML"),
        ("teacher", "key=value"),
        ("name.sub=1", "name"),
    ],
)
def test_a_wrong_override_is_refused_by_name(override: str, named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        read_recipe("digits", [override])


def test_encoders_need_guidance_to_be_off_where_they_are_trained() -> None:
    with pytest.raises(RecipeError, match=r"an encoder goes with guidance\.min: 1"):
        read_recipe("digits-encoder", ["guidance={min: 2, max: 5, default: 2}", "evaluation.guidance_scales=[2.0]"])


def test_every_wrong_field_is_told_and_a_misspelt_one_by_its_right_name() -> None:
    wrong = ["stage_two.lr=fast", "teacher.updats=3", "seeed=1", "guidance.max=0.5", "xyzzy=1"]
    wrong += ["stage_one=3", "evaluation.seeds=1", "consistency={rank: 1, source: 4, grid: 4, updates: 1}"]
    with pytest.raises(RecipeError) as caught:
        read_recipe("digits", wrong)
    told = str(caught.value).removeprefix("recipe digits: ").split("; ")
    assert sorted(told) == [
        "consistency.rank: that is a field of other sections, not of this one",
        "evaluation.seeds: must be a list, such as [1, 2]",
        "guidance: guidance needs min <= default <= max",
        "seeed: there is no such field, did you mean seed?",
        "stage_one: must be a section, field by field",
        "stage_two.lr: Input should be a valid number, unable to parse string as a number",
        "teacher.updats: there is no such field, did you mean updates?",
        "xyzzy: there is no such field",
    ]


def test_an_unknown_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match="digits"):
        read_recipe("digit")


def test_broken_yaml_and_a_list_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [", encoding="utf-8")
    with pytest.raises(RecipeError, match="not valid YAML"):
        read_recipe(broken)
    broken.write_text("seed: 1\nstage_one: {lr: 1.0, lr: 2.0}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="lr is given twice"):
        read_recipe(broken)
    broken.write_text("- a", encoding="utf-8")
    with pytest.raises(RecipeError, match="mapping"):
        read_recipe(broken)


def test_changed_fields_are_listed_by_dotted_name() -> None:
    old: Recipe = read_recipe("digits")
    new = read_recipe("digits", ["seed=5", "teacher.lr=0.5"])
    assert changed_fields(old, new) == ["seed", "teacher.lr"]
    assert changed_fields(old, old) == []


@pytest.mark.parametrize(
    "override",
    [
        "unet.sample_size=null",
        "unet.sample_size=[64, 64]",
        "unet={sample_size: 64, in_channels: 4, cross_attention_dim: 768}",
        "unet.cross_attention_dim=wide",
    ],
)
def test_the_shape_of_latents_and_conditions_is_told(override: str) -> None:
    with pytest.raises(RecipeError, match=r"unet\.(sample_size|out_channels|cross_attention_dim) must be given"):
        read_recipe("sd15", [override])


def test_arguments_diffusers_refuses_are_a_recipe_error() -> None:
    recipe = read_recipe("digits", ["unet.block_out_channel=[8, 8]"])
    with pytest.raises(RecipeError, match="block_out_channel"):
        new_teacher(recipe.unet, 0)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="UTF-8"):
        read_recipe(file)


@pytest.mark.parametrize("name", ["digits-shared", "digits-lcm"])
def test_shared_weights_and_consistency_exclude_sharding(name: str) -> None:
    with pytest.raises(RecipeError, match=r"compute\.shard"):
        read_recipe(name, ["compute.shard=true"])


@pytest.mark.parametrize("override", ["guidance=at_sampling", "on_policy=0.5", "lora={rank: 2}"])
def test_variants_that_need_separate_weights_say_so(override: str) -> None:
    with pytest.raises(RecipeError, match="weights: separate"):
        read_recipe("digits-shared", [f"stage_two.{override}"])


@pytest.mark.parametrize("override", ["on_policy=0.5", "lora={rank: 2}"])
def test_variants_exclude_sharding_and_two_networks(override: str) -> None:
    with pytest.raises(RecipeError, match=r"compute\.shard"):
        read_recipe("digits", [f"stage_two.{override}", "compute.shard=true"])
    with pytest.raises(RecipeError, match="at_sampling goes without"):
        read_recipe("digits-two-networks", [f"stage_two.{override}"])


def test_two_networks_have_no_guidance_to_learn_from_the_teacher() -> None:
    with pytest.raises(RecipeError, match="at_sampling goes without first_target: teacher"):
        read_recipe("digits-two-networks", ["stage_two.first_target=teacher"])
    with pytest.raises(RecipeError, match=r"say nothing with stage_two\.guidance: at_sampling"):
        read_recipe("digits-two-networks", ["guidance.log_snr_min=-2"])
    with pytest.raises(RecipeError, match="nor without guidance above 1"):
        read_recipe("digits-single", ["stage_two.guidance=1.0", "guidance.log_snr_min=-2"])


def test_consistency_needs_students_that_take_guidance() -> None:
    with pytest.raises(RecipeError, match=r"stage_two\.guidance must be input"):
        read_recipe("digits-consistency", ["stage_two.guidance=2.0"])


def test_a_consistency_finish_needs_a_student_of_the_deterministic_sampler() -> None:
    with pytest.raises(RecipeError, match=r"consistency\.source"):
        read_recipe("digits-stochastic", ["consistency={source: 4, grid: 4, updates: 1}"])


def test_a_base_is_changed_field_by_field_and_its_lists_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: digits\nname: mine\nteacher: {lr: 0.5}\nevaluation: {seeds: [7]}\n", encoding="utf-8")
    mine, base = read_recipe(file, ["stage_one.lr=0.25"]), read_recipe("digits")
    assert changed_fields(base, mine) == ["name", "teacher.lr", "stage_one.lr", "evaluation.seeds"]
    assert mine.teacher.updates == base.teacher.updates


def test_a_teacher_of_another_form_takes_the_place_of_the_bases(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: emoji\nname: mine\nteacher: {folder: models/mine, licence: MIT}\n", encoding="utf-8")
    mine, base = read_recipe(file), read_recipe("emoji")
    assert isinstance(mine.teacher, FolderTeacher)
    assert (mine.teacher.folder, mine.teacher.licence) == (Path("models/mine"), "MIT")
    assert (mine.unet, mine.stage_two) == (base.unet, base.stage_two)


@pytest.mark.parametrize("base", ["mine", "7", "[digits]"])
def test_a_base_that_is_not_shipped_is_refused(base: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"base: {base}\nname: mine\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="base"):
        read_recipe(file)


def test_glyphs_are_judged_at_the_default_guidance() -> None:
    with pytest.raises(RecipeError, match=r"evaluation\.guidance_scales must hold guidance\.default, 3"):
        read_recipe("emoji", ["guidance.default=3"])
    assert read_recipe("emoji", ["guidance.default=9"]).guidance.default == 9


def test_what_an_evaluation_depends_on_is_told_without_defaults() -> None:
    """So that a field of a later release changes nothing for runs that do not use it."""
    recipe = read_recipe("digits")
    said = read_recipe("digits", ["teacher.clip_norm=1.0", "export.description=other"])
    assert said.evaluated_sha256() == recipe.evaluated_sha256()
    assert read_recipe("digits", ["teacher.clip_norm=2.0"]).evaluated_sha256() != recipe.evaluated_sha256()
    first, *rest = recipe.stage_two.halvings
    kept = first.model_copy(update={"keep": True})
    other = recipe.model_copy(update={"stage_two": recipe.stage_two.model_copy(update={"halvings": (kept, *rest)})})
    assert other.evaluated_sha256() != recipe.evaluated_sha256()
