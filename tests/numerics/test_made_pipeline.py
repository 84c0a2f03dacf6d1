"""A pipeline made from captioned pictures: stock when done, resumed to the same bytes, then distilled as any."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, StableDiffusionPipeline
from rich.progress import Progress
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer

from distill_jobs import stage_one
from distill_jobs.data.captioned import index_folder
from distill_jobs.data.framing import pixels_of
from distill_jobs.data.open import open_source
from distill_jobs.data.source import Condition
from distill_jobs.draws import Draws
from distill_jobs.errors import RecipeError
from distill_jobs.job import run_job
from distill_jobs.latent_sections import AutoencoderSection, TextSection
from distill_jobs.making.autoencoder import (
    new_autoencoder,
    save_autoencoder,
)
from distill_jobs.making.pipeline import _Making
from distill_jobs.making.prompted import PromptedNetwork, new_text_encoder, token_ids
from distill_jobs.making.words import POOLING, with_words
from distill_jobs.phases import Phases
from distill_jobs.pipelines import tiny_decoder
from distill_jobs.pipelines.checks import open_folder
from distill_jobs.pipelines.teacher import load_network
from distill_jobs.pipelines.text import PromptEncoder
from distill_jobs.pipelines.tiny_decoder import train_decoder
from distill_jobs.pipelines.vae import Autoencoder
from distill_jobs.plan import plan_of
from distill_jobs.processes import Processes
from distill_jobs.recipe_file import read_recipe
from distill_jobs.run_folder import RunFolder, stored_recipe
from distill_jobs.sections import ComputeSection
from distill_jobs.state import Phase, TrainingState
from distill_jobs.student import load_stock, new_teacher, predict
from distill_jobs.taken import takeable
from tests.support.latent_run import PROMPTED_UNET as UNET
from tests.support.latent_run import latent_recipe

AUTOENCODER = {"updates": 3, "batch_size": 4, "ema": 0.5, "block_out_channels": [8, 16], "norm_num_groups": 4}
TEACHER: dict[str, Any] = {
    "autoencoder": AUTOENCODER,
    "text": {
        "words": 600,
        "tokens": 16,
        "width": 16,
        "layers": 1,
        "heads": 2,
        "training": {"updates": 3, "batch_size": 4},
    },
    "updates": 3,
    "batch_size": 4,
    "ema": 0.5,
}
FINETUNE = {"updates": 1, "pictures": 9, "shares": {"plain": 1, "placed": 0, "recoloured": 0}}
SCHEDULE = {"kind": "squaredcos_cap_v2", "rescale_zero_terminal_snr": True}
SHORT: dict[str, Any] = {
    "stage_two": {"batch_size": 4, "halvings": [{"steps": 4, "updates": 1}]},
    "decoder": {"target": "data", "updates": 3, "batch_size": 4, "ema": 0.5, "width": 8, "blocks": 1},
    "evaluation": {"samples": 20, "seeds": [1], "guidance_scales": [5], "teacher_steps": 8},
    "export": {"name": "made", "students": [4], "default_steps": 4},
}
QUIET = Progress(disable=True)
ADVANCE = TrainingState.advance


def made_recipe(work: Path, **changes: Any) -> Path:
    file = latent_recipe(work, work)
    told = {"teacher": TEACHER, "unet": UNET, "schedule": SCHEDULE, "checkpoint_every": 1, **SHORT, **changes}
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **told}))
    return file


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_one, "GATE_ROWS", 8)
        run_job(read_recipe(made_recipe(work)), work / "run", resume=False, progress=QUIET)
    return work


def test_what_is_made_is_a_stock_pipeline(work: Path) -> None:
    folder = open_folder(work / "run" / "teacher")
    assert folder.prediction == "v_prediction"
    assert folder.schedule.rescale_zero_terminal_snr
    for phase in ("teacher", "students/d4"):
        pipeline = StableDiffusionPipeline.from_pretrained(work / "run" / phase, use_safetensors=True)
        pipeline.set_progress_bar_config(disable=True)
        [picture] = pipeline("a cat number 3", num_inference_steps=4, guidance_scale=3.0).images
        assert picture.size == (16, 16)


def test_every_channel_of_the_latents_has_zero_mean_and_unit_deviation(work: Path) -> None:
    autoencoder = Autoencoder.load(open_folder(work / "run" / "teacher"))
    with torch.inference_mode():
        encoded = autoencoder.encode(pixels_of(index_folder(work / "images"), 16))
    latents = encoded.sample(Draws(0, "scaling").normal(0, tuple(encoded.mean.shape)))
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(latents.shape[1]), rtol=0, atol=0.01)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(latents.shape[1]), rtol=0, atol=0.01)
    assert (work / "run" / "autoencoder" / "reconstructions.png").stat().st_size > 0


def test_a_decoder_of_the_data_is_taught_the_datas_own_pictures(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, teacher = read_recipe(work / "run" / "recipe.yaml"), open_folder(work / "run" / "teacher")
    processes, caught = Processes(ComputeSection(), tmp_path), list[Phase]()
    source = open_source(recipe, teacher, processes, QUIET)
    monkeypatch.setattr(tiny_decoder, "train_into", lambda folder, trainer, phase, fill: caught.append(phase))
    train_decoder(Phases(recipe, RunFolder(tmp_path), SimpleNamespace(processes=processes), source, teacher))
    [phase], draws = caught, Draws(0, "decoder")
    shown = source.pixels(draws, 3, 4)
    assert float(phase.loss(lambda latents: shown, draws, 3, 4).loss.abs().max()) == 0


def test_standardised_latents_are_of_the_same_pictures(tmp_path: Path) -> None:
    vae = new_autoencoder(AutoencoderSection(updates=1, batch_size=1, lr=1e-3, block_out_channels=(16, 16)), 16, 0)
    shown = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        before = vae.encode(shown).latent_dist
        picture = vae.decode(before.mean).sample
    latents = before.mean * torch.tensor([0.1, 1, 5, 30]).reshape(1, -1, 1, 1) + 7
    save_autoencoder(vae, tmp_path, latents)
    saved = AutoencoderKL.from_pretrained(tmp_path).eval()
    deviation, mean = (part.reshape(1, -1, 1, 1) for part in (latents.std((0, 2, 3)), latents.mean((0, 2, 3))))
    with torch.inference_mode():
        after = saved.encode(shown).latent_dist
        torch.testing.assert_close(after.mean, (before.mean - mean) / deviation, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(after.std, before.std / deviation, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(saved.decode(after.mean).sample, picture, rtol=1e-3, atol=1e-4)


def test_a_resumed_making_ends_in_the_same_bytes(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, advance = read_recipe(work / "run" / "recipe.yaml"), TrainingState.advance
    monkeypatch.setattr(stage_one, "GATE_ROWS", 8)
    for fatal in ("autoencoder", "text_encoder", "teacher", "decoder", ""):

        def fail(state: TrainingState, fatal: str = fatal) -> Any:
            if state._phase.name == fatal and state.update == 1:
                raise RuntimeError("power cut")
            return advance(state)

        monkeypatch.setattr(TrainingState, "advance", fail)
        with pytest.raises(RuntimeError, match="power cut") if fatal else nullcontext():
            run_job(recipe, tmp_path / "run", resume=fatal != "autoencoder", progress=QUIET)
    for part in ("teacher/vae", "teacher/unet", "teacher/text_encoder", "teacher/tokenizer", "decoder"):
        for file in (work / "run" / part).iterdir():
            if file.name == "phase.json":  # holds its seconds
                continue
            assert (tmp_path / "run" / part / file.name).read_bytes() == file.read_bytes()
    assert (tmp_path / "run" / "decoder" / "diffusion_pytorch_model.safetensors").is_file()


def test_words_are_learned_first_and_stay(work: Path) -> None:
    run = work / "run"
    learned, kept = (
        load_file(folder / "model.safetensors")
        for folder in (run / "text_encoder", run / "teacher" / "text_encoder")
    )
    assert learned.keys() == kept.keys()
    assert all(torch.equal(weights, learned[name]) for name, weights in kept.items())
    section, tokenizer = (
        TextSection(**TEACHER["text"]),
        CLIPTokenizer.from_pretrained(run / "teacher" / "tokenizer"),
    )
    before = new_text_encoder(section, tokenizer, 0).state_dict()
    assert any(not torch.equal(weights, before[name]) for name, weights in learned.items())
    pooled = load_file(run / "text_encoder" / POOLING)
    own = load_stock(run / "teacher").add_embedding.state_dict()
    assert pooled.keys() == own.keys()
    assert any(not torch.equal(weights, own[name]) for name, weights in pooled.items())
    for config in run.glob("te*/**/config.json"):
        assert str(work) not in config.read_text()


def test_the_network_starts_with_what_was_learned_of_words(work: Path) -> None:
    text = TextSection(**TEACHER["text"])
    tokenizer = CLIPTokenizer.from_pretrained(work / "run" / "teacher" / "tokenizer")
    fresh = PromptedNetwork(new_teacher(UNET, 0), new_text_encoder(text, tokenizer, 0))
    taught = with_words(fresh, work / "run" / "text_encoder")
    pooled = load_file(work / "run" / "text_encoder" / POOLING)
    for name, weights in taught.unet.add_embedding.state_dict().items():
        assert torch.equal(weights, pooled[name])
    assert {name.partition(".")[0] for name, p in taught.named_parameters() if p.requires_grad} == {"unet"}


def test_processes_share_the_encoding_of_an_odd_number_of_pictures(work: Path) -> None:
    recipe, entries = read_recipe(work / "run" / "recipe.yaml"), index_folder(work / "images")[:7]
    autoencoder, shares = Autoencoder.load(open_folder(work / "run" / "teacher")), list[Tensor]()
    for index in range(2):
        one = SimpleNamespace(count=2, index=index, device=torch.device("cpu"), gathered=lambda rows: rows)
        making = _Making(recipe, recipe.teacher, _run(work), SimpleNamespace(processes=one), entries)
        shares.append(making._encoded_by_all(autoencoder, lambda n: None).mean)
    assert [len(share) for share in shares] == [4, 4]
    with torch.inference_mode():
        whole = autoencoder.encode(pixels_of(entries, 16)).mean
    torch.testing.assert_close(torch.cat(shares)[:7].float(), whole, rtol=1e-3, atol=1e-3)


def test_without_training_of_its_own_the_text_encoder_learns_with_the_network(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_one, "GATE_ROWS", 8)
    recipe = read_recipe(work / "run" / "recipe.yaml", ["teacher.text.training=null", "decoder=null"])
    assert takeable(recipe, _run(work)).names == {"autoencoder"}
    run_job(recipe, tmp_path / "run", resume=False, progress=QUIET, taken_from=work / "run")
    assert not (tmp_path / "run" / "text_encoder").exists()
    section = TextSection(**{**TEACHER["text"], "training": None})
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "run" / "teacher" / "tokenizer")
    before = new_text_encoder(section, tokenizer, 0).state_dict()
    after = load_file(tmp_path / "run" / "teacher" / "text_encoder" / "model.safetensors")
    assert any(not torch.equal(weights, before[name]) for name, weights in after.items())


def test_another_run_takes_the_pipeline(work: Path) -> None:
    recipe = read_recipe(work / "run" / "recipe.yaml", ["stage_one.updates=9"])
    assert {"autoencoder", "text_encoder", "teacher"} <= takeable(recipe, _run(work)).names
    other = read_recipe(work / "run" / "recipe.yaml", ["teacher.lr=0.5"])
    assert takeable(other, _run(work)).names == {"autoencoder", "text_encoder", "decoder"}
    otherwise = read_recipe(work / "run" / "recipe.yaml", ["teacher.text.training.lr=0.5"])
    assert takeable(otherwise, _run(work)).names == {"autoencoder", "decoder"}
    smaller = read_recipe(work / "run" / "recipe.yaml", ["teacher.autoencoder.lr=0.5"])
    assert takeable(smaller, _run(work)).names == set()


def test_what_a_bundle_says_and_where_latents_lie_may_change(work: Path, tmp_path: Path) -> None:
    said = ["data.licence=mine", "teacher.licence=mine", "data.cache=elsewhere"]
    recipe = read_recipe(work / "run" / "recipe.yaml", said)
    assert not takeable(recipe, _run(work)).refused
    shutil.copytree(work / "run", tmp_path / "run")
    RunFolder(tmp_path / "run").take_up(recipe, resume=True)
    assert stored_recipe(RunFolder(tmp_path / "run")) == recipe


def test_a_resume_with_other_pictures_is_refused_while_the_pipeline_is_made(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(work / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "teacher")
    monkeypatch.setattr("distill_jobs.making.pipeline._identity", lambda entries: "another")
    with pytest.raises(RecipeError, match="not those that"):
        run_job(read_recipe(work / "run" / "recipe.yaml"), tmp_path / "run", resume=True, progress=QUIET)


def test_its_phases_are_planned(work: Path) -> None:
    first, second, third, *_ = plan_of(read_recipe(work / "run" / "recipe.yaml")).phases
    assert (first.name, second.name, third.name) == ("autoencoder", "text_encoder", "teacher")
    assert 0 < second.trained.flops < third.trained.flops
    made = new_autoencoder(AutoencoderSection(**AUTOENCODER), 16, 0)
    assert first.trained.parameters == sum(p.numel() for p in made.parameters())


def test_training_tells_the_network_what_a_bundle_will(work: Path) -> None:
    """Token ids and conditions of the training code equal those of the pipeline's own encoder."""
    folder = open_folder(work / "run" / "teacher")
    prompts, unet = PromptEncoder.load(folder), load_network(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder.path / "tokenizer")
    captions = ["a cat number 3", "Ein Käse 🧀 <|endoftext|>", "a dog " * 20]
    ids = token_ids(tokenizer, captions)
    assert ids.shape == (3, 16)
    torch.testing.assert_close(ids[[0, 2]], torch.stack([_cut(prompts, captions[i]) for i in (0, 2)]))
    z_t, timestep = torch.randn(3, 4, 8, 8), torch.tensor([10.0, 500.0, 900.0])
    together = PromptedNetwork(unet, prompts.encoders.encoders[0])
    with torch.inference_mode():
        ours = predict(together, z_t[:1], timestep[:1], Condition(ids[:1]))
        stock = predict(unet, z_t[:1], timestep[:1], prompts.encode(captions[:1]))
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-6)


def _cut(prompts: PromptEncoder, caption: str) -> Tensor:
    return torch.from_numpy(prompts.tokenizer.cut(caption))


def _run(work: Path) -> RunFolder:
    return RunFolder(work / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unet": {**UNET, "cross_attention_dim": 32}}, "unet.cross_attention_dim must be 16"),
        ({"unet": {**UNET, "sample_size": None}}, "unet.sample_size must be given"),
        ({"schedule": {"kind": "cosine"}}, "squaredcos_cap_v2 is the same curve"),
        ({"compute": {"shard": True}, "decoder": None}, "goes without inpainting and compute.shard"),
        ({"inpainting": {}, "unet": {**UNET, "in_channels": 9}}, "goes without inpainting"),
        ({"teacher": {**TEACHER, "text": {"width": 15, "heads": 2}}}, "unet.cross_attention_dim must be 15"),
        ({"data": {"kind": "image_folder", "path": "x", "unreadable": "skip"}}, "it is made of every image"),
        ({"data": "digits"}, "teacher.autoencoder to make one"),
        ({"teacher": {**TEACHER, "finetune": FINETUNE}}, "teacher.finetune is for data.kind: glyphs"),
        (
            {"unet": {**UNET, "addition_embed_type": None}},
            "teacher.text.training needs unet.addition_embed_type: text",
        ),
    ],
    ids=["text", "size", "schedule", "shard", "inpainting", "width", "unreadable", "digits", "finetune", "pooling"],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe(made_recipe(tmp_path, **changes))
