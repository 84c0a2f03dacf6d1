"""Phases taken from another run: those with an equal past, to the same bytes, and no others."""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest
import torch
from diffusers import AutoencoderKL
from onnx import numpy_helper
from rich.progress import Progress
from typer.testing import CliRunner

from distill_jobs.cli import app
from distill_jobs.errors import RecipeError
from distill_jobs.job import run_job
from distill_jobs.latent_sections import GlyphData
from distill_jobs.loop import Trainer
from distill_jobs.pipelines.checks import open_folder
from distill_jobs.pipelines.text import PromptEncoder
from distill_jobs.pipelines.tiny_decoder import load_decoder
from distill_jobs.plan import plan_of
from distill_jobs.recipe_file import read_recipe
from distill_jobs.run_folder import RunFolder
from distill_jobs.state import Phase
from distill_jobs.student import load_stock, weights_sha256
from distill_jobs.taken import pasts, take_phases, takeable
from tests.support.tiny_recipe import OVERRIDES, weights_of

ROOT = Path(__file__).parents[3]
FIRST = ("teacher", "stage_one")
EMOJI = (
    *("teacher", "teacher.autoencoder", "teacher.text.training", "teacher.finetune"),
    *("stage_one", "stage_two", "decoder"),
)
"""Sections of the recipe that have batches."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    out = tmp_path_factory.mktemp("run") / "whole"
    return run_job(read_recipe("digits", OVERRIDES), out, resume=False, progress=Progress(disable=True))


@pytest.mark.parametrize(
    ("override", "taken"),
    [
        ("export.name=other", {"teacher", "stage_one", "d4", "d2", "d1"}),
        ("stage_two.halvings=[{steps: 4, updates: 6}, {steps: 2, updates: 5}]", {"teacher", "stage_one", "d4"}),
        ("stage_two.lr=0.1", {"teacher", "stage_one"}),
        ("stage_two.weights=shared", {"teacher", "stage_one"}),
        ("stage_one.accumulate=4", {"teacher", "stage_one", "d4", "d2", "d1"}),
        ("stage_two.accumulate=2", {"teacher", "stage_one", "d4", "d2", "d1"}),
        ("compute.gradient_checkpointing=true", {"teacher", "stage_one", "d4", "d2", "d1"}),
        ("guidance.default=3", {"teacher", "stage_one", "d4", "d2", "d1"}),
        ("guidance.max=4", {"teacher"}),
        ("guidance.log_snr_min=-2", {"teacher"}),
        ("stage_one.lr=0.1", {"teacher"}),
        ("teacher.lr=0.1", set()),
        ("compute.precision=bf16", {"teacher"}),
        ("seed=1", set()),
    ],
)
def test_a_phase_is_taken_while_all_that_came_before_it_is_equal(
    override: str, taken: set[str], finished: RunFolder
) -> None:
    sets = [override, "export.students=[4]", "export.default_steps=4"]
    assert takeable(read_recipe("digits", [*OVERRIDES, *sets]), finished).names == taken


def test_taken_phases_are_not_trained_and_the_others_come_out_as_in_a_run_of_their_own(
    finished: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    train = Trainer.train

    def watched(self: Trainer, phase: Phase) -> object:
        trained.append(phase.name)
        return train(self, phase)

    monkeypatch.setattr(Trainer, "train", watched)
    recipe = read_recipe("digits", [*OVERRIDES, "stage_two.lr=1.0e-3"])
    quiet = Progress(disable=True)
    folder = run_job(recipe, tmp_path / "run", resume=False, progress=quiet, taken_from=finished.path)
    assert trained == ["d4", "d2", "d1"]
    taken = Path("stage_one") / "unet" / "diffusion_pytorch_model.safetensors"
    assert (folder.path / taken).samefile(finished.path / taken)  # no second copy on the same disk
    assert folder.gate.read_bytes() == finished.gate.read_bytes()
    mine, theirs = weights_of(folder.path), weights_of(finished.path)
    assert [name for name in mine if mine[name] == theirs[name]] == ["teacher", "stage_one"]
    alone = run_job(recipe, tmp_path / "alone", resume=False, progress=quiet)
    assert weights_of(alone.path) == mine


def test_what_is_not_taken_is_said_with_its_reason(finished: RunFolder, tmp_path: Path) -> None:
    recipe = read_recipe("digits", [*OVERRIDES, "stage_two.lr=0.1"])
    said = list(take_phases(recipe, finished, RunFolder(tmp_path / "run")))
    assert said[0] == f"teacher: taken from {finished.path}"
    assert said[2] == f"d4: not taken from {finished.path}: stage_two.lr differs"
    again = list(take_phases(recipe, finished, RunFolder(tmp_path / "run")))
    assert again == said[2:]  # what stands is not copied again


def test_phases_of_another_teacher_or_other_images_are_refused(finished: RunFolder, tmp_path: Path) -> None:
    """Where equal recipes name a folder whose weights or images were exchanged."""
    recipe, mine = read_recipe("digits", OVERRIDES), RunFolder(tmp_path / "run")
    source = RunFolder(tmp_path / "source")
    shutil.copytree(finished.path, source.path)
    source.data.write_text('{"sha256": "a", "images": 3}')
    list(take_phases(recipe, source, mine))
    mine.check_teacher(weights_sha256(source.teacher))
    mine.keep_data(mine.data, "a", 3)
    with pytest.raises(RecipeError, match=rf"taken from {source.path} learned from a teacher of other weights"):
        mine.check_teacher("other")
    with pytest.raises(RecipeError, match="3 images then, 4 now"):
        mine.keep_data(mine.data, "b", 4)
    other = RunFolder(tmp_path / "other")
    other.path.mkdir()
    other.keep_data(other.data, "b", 4)
    with pytest.raises(RecipeError, match="4 images then, 3 now"):
        list(take_phases(recipe, source, other))
    assert not other.stage_one.exists()


def test_an_unfinished_phase_is_not_taken(finished: RunFolder, tmp_path: Path) -> None:
    recipe = read_recipe("digits", OVERRIDES)
    half = RunFolder(tmp_path / "half")
    half.path.mkdir()
    half.recipe.write_bytes(finished.recipe.read_bytes())
    assert takeable(recipe, half).refused[0] == ("teacher", "not finished there")


def test_a_wrong_source_is_refused_before_anything_is_written(finished: RunFolder, tmp_path: Path) -> None:
    recipe, out = read_recipe("digits", OVERRIDES), tmp_path / "run"
    with pytest.raises(RecipeError, match="not a run folder"):
        run_job(recipe, out, resume=False, progress=Progress(disable=True), taken_from=tmp_path)
    assert not out.exists()
    with pytest.raises(RecipeError, match="itself"):
        run_job(recipe, finished.path, resume=True, progress=Progress(disable=True), taken_from=finished.path)


def test_a_dry_run_says_what_is_taken(finished: RunFolder, tmp_path: Path) -> None:
    sets = [part for override in (*OVERRIDES, "stage_two.lr=0.1") for part in ("--set", override)]
    command = ["run", "digits", "--dry-run", "--from", str(finished.path), "--out", str(tmp_path / "run"), *sets]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert result.output.count("taken") == 2


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("digits-consistency", {"teacher", "stage_one", "d32", "d16", "d8", "d4"}),
        ("digits-lcm", {"teacher", "stage_one"}),
        ("digits-lora", {"teacher", "stage_one"}),
        ("digits-on-policy", {"teacher", "stage_one"}),
        ("digits-shared", {"teacher", "stage_one"}),
        ("digits-single", {"teacher", "stage_one"}),
        ("digits-stochastic", {"teacher", "stage_one"}),
        ("digits-two-networks", {"teacher"}),
    ],
)
def test_shipped_variants_take_what_they_share_with_digits_separate(name: str, shared: set[str]) -> None:
    theirs = {past.name: past.fields for past in pasts(read_recipe("digits-separate"))}
    mine = {past.name: past.fields for past in pasts(read_recipe(name))}
    assert {phase for phase in mine if mine[phase] == theirs.get(phase)} == shared


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("emoji", EMOJI),
        ("digits-consistency", ("teacher", "consistency")),
        ("digits-encoder", ("teacher", "encoder")),
    ],
)
def test_no_past_depends_on_how_batches_fit_a_device(name: str, sections: tuple[str, ...]) -> None:
    other = ["compute.gradient_checkpointing=true", *(f"{section}.accumulate=2" for section in sections)]
    assert pasts(read_recipe(name)) == pasts(read_recipe(name, other))


def test_no_past_depends_on_which_networks_are_kept() -> None:
    halvings = "stage_two.halvings=[{steps: 2, updates: 1, keep: true}, {steps: 1, updates: 1}]"
    kept, last = (
        pasts(read_recipe("digits-shared", [h, "export.students=[2, 1]", "export.default_steps=2"]))
        for h in (halvings, halvings.replace(", keep: true", ""))
    )
    assert kept == last


def test_variants_have_as_many_updates_as_the_chain_they_are_compared_with() -> None:
    def trained(name: str) -> int:
        return sum(p.training.updates for p in plan_of(read_recipe(name)).phases if p.name not in FIRST)

    names = ["digits-consistency", "digits-lcm", "digits-lora", "digits-on-policy", "digits-two-networks"]
    assert {trained(name) for name in (*names, "digits-shared", "digits-separate", "digits-single")} == {7300}


def test_the_emoji_autoencoder_that_comes_with_the_source_is_taken(tmp_path: Path) -> None:
    """It gives back discs of any colour on white, which it never saw."""
    recipe, shipped = read_recipe("emoji"), RunFolder(ROOT / "distill_jobs" / "weights" / "emoji")
    assert isinstance(recipe.data, GlyphData)
    assert takeable(recipe, shipped).names == {"autoencoder", "text_encoder", "teacher", "finetune", "decoder"}
    mine = RunFolder(tmp_path)
    list(take_phases(recipe, shipped, mine))
    vae = AutoencoderKL.from_pretrained(mine.autoencoder, use_safetensors=True).eval()
    colours = 2 * torch.rand(8, 3, 1, 1, generator=torch.Generator().manual_seed(0)) - 1
    across = torch.linspace(-1, 1, recipe.data.side_px)
    discs = torch.where(across[:, None] ** 2 + across[None, :] ** 2 < 0.6, colours, torch.ones(()))
    with torch.inference_mode():
        back = vae.decode(vae.encode(discs).latent_dist.mean).sample
    assert float((back - discs).abs().mean((1, 2, 3)).max()) < 0.05


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_emoji_decoder_that_comes_with_the_source_is_that_of_the_bundle(precision: str, tmp_path: Path) -> None:
    recipe = read_recipe("emoji", [f"compute.precision={precision}"])
    list(take_phases(recipe, RunFolder(ROOT / "distill_jobs" / "weights" / "emoji"), RunFolder(tmp_path)))
    tiny = load_decoder(RunFolder(tmp_path).decoder)
    graph = onnx.load(str(ROOT / "server" / "bundles" / "emoji" / "decode.onnx")).graph
    held = {each.name.removesuffix("/kept"): numpy_helper.to_array(each) for each in graph.initializer}
    for name, weight in tiny.state_dict().items():
        assert torch.equal(weight, torch.tensor(held[f"decoder.{name}"]).float())


def test_the_emoji_teacher_that_comes_with_the_source_is_taken(tmp_path: Path) -> None:
    recipe, shipped = read_recipe("emoji"), RunFolder(ROOT / "distill_jobs" / "weights" / "emoji")
    mine = RunFolder(tmp_path)
    list(take_phases(recipe, shipped, mine))
    unet = load_stock(mine.teacher)
    assert unet.dtype == torch.float32
    assert {name: unet.config[name] for name in recipe.unet} == {
        name: tuple(value) if isinstance(unet.config[name], tuple) else value for name, value in recipe.unet.items()
    }
    assert PromptEncoder.load(open_folder(mine.teacher)).encode(["red heart"]).tokens.isfinite().all()
