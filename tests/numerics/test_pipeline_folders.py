"""Reading stock diffusers folders: the same conditions, latents and images as diffusers, and refusals by name."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from distill_jobs.errors import TeacherError
from distill_jobs.pipelines.checks import open_folder
from distill_jobs.pipelines.teacher import load_network
from distill_jobs.pipelines.text import PromptEncoder
from distill_jobs.pipelines.vae import Autoencoder
from engines.condition import load_tokenizer
from engines.errors import BundleError, RequestError
from engines.manifest import ConditionSpec
from engines.schedule import NoiseSchedule
from tests.support import tiny_pipelines as tiny
from tests.support.toy_bundle import ToyOptions, make_toy_bundle

PROMPTS = ["a cat", "", "Dog; über 7?", "x " * 200]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    made = {
        "sd15": tiny.sd(root / "a"),
        "sd21": tiny.sd(root / "b", prediction="v_prediction"),
        "inpaint": tiny.sd(root / "c", in_channels=9),
        "sdxl": tiny.sdxl(root / "d"),
    }
    for name, pipeline in made.items():
        pipeline.save_pretrained(root / name, safe_serialization=True)
    return {name: root / name for name in made}


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_conditions_equal_diffusers(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    if name == "sdxl":
        tokens, null, pooled, null_pooled = tiny.sdxl(tmp_path).encode_prompt(PROMPTS)
    else:
        stock = tiny.sd(tmp_path, prediction="v_prediction" if name == "sd21" else "epsilon")
        (tokens, null), pooled, null_pooled = stock.encode_prompt(PROMPTS, "cpu", 1, True), None, [None]
    encoder = PromptEncoder.load(open_folder(folders[name]))
    condition, empty = encoder.encode(PROMPTS), encoder.null()
    torch.testing.assert_close(condition.tokens, tokens, rtol=0, atol=1e-6)
    torch.testing.assert_close(empty.tokens, null[:1], rtol=0, atol=1e-6)
    if pooled is None:
        assert condition.pooled is empty.pooled is None
    else:
        torch.testing.assert_close(condition.pooled, pooled, rtol=0, atol=1e-6)
        torch.testing.assert_close(empty.pooled, null_pooled[:1], rtol=0, atol=1e-6)


def test_special_tokens_spelt_in_a_prompt_are_plain_text(folders: dict[str, Path]) -> None:
    for name in ("sd15", "sd21"):
        tokenizer = PromptEncoder.load(open_folder(folders[name])).tokenizer
        row = tokenizer.encode(f"a {tiny.END} cat!")
        words = tiny.vocabulary()
        assert (row == words[tiny.END]).sum() == tiny.TOKENS - int(np.argmax(row == words[tiny.END]))
        assert words["!</w>"] in row
        assert words["!"] not in row
        assert words["cat</w>"] in row


def test_a_long_prompt_is_refused_and_a_long_caption_cut(folders: dict[str, Path]) -> None:
    tokenizer = PromptEncoder.load(open_folder(folders["sd15"])).tokenizer
    assert len(tokenizer.encode("x " * 75)) == tiny.TOKENS
    with pytest.raises(RequestError, match="76 tokens long; this model reads at most 75") as caught:
        tokenizer.encode("x " * 76)
    assert (caught.value.param, caught.value.code) == ("prompt", "prompt_too_long")
    cut = tokenizer.cut("x " * 75 + "cat")
    np.testing.assert_array_equal(cut, tokenizer.encode("x " * 75))
    assert cut[-1] == tiny.vocabulary()[tiny.END]


def test_a_bundle_reads_the_tokenizer_back(folders: dict[str, Path], tmp_path: Path) -> None:
    ours = PromptEncoder.load(open_folder(folders["sd15"])).tokenizer
    toy = make_toy_bundle(tmp_path / "toy", ToyOptions())
    clip = ConditionSpec(kind="clip", tokenizer="tokenizer.json", tokens=tiny.TOKENS, width=32)
    bundle = replace(toy, manifest=toy.manifest.model_copy(update={"condition": clip}))
    with pytest.raises(BundleError, match="not a tokenizer of kind clip"):
        load_tokenizer(bundle)
    bundle.file("tokenizer.json").write_text(ours.dump(), encoding="utf-8")
    read = load_tokenizer(bundle)
    for prompt in ("a cat", *read.known()):
        np.testing.assert_array_equal(read.encode(prompt), ours.encode(prompt))


def test_latents_and_images_equal_diffusers(folders: dict[str, Path], tmp_path: Path) -> None:
    stock, ours = tiny.sd(tmp_path).vae, Autoencoder.load(open_folder(folders["sd15"]))
    images = torch.rand((2, 3, 16, 16), generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.no_grad():
        posterior = stock.encode(images).latent_dist
        encoded = ours.encode(images)
        noise = torch.randn(encoded.mean.shape, generator=torch.Generator().manual_seed(1))
        expected = posterior.sample(torch.Generator().manual_seed(1)) * 0.18215
        torch.testing.assert_close(encoded.sample(noise), expected, rtol=0, atol=1e-6)
        decoded = stock.decode(expected / 0.18215).sample
        torch.testing.assert_close(ours.decode(expected), decoded, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "rescaled"), [("linear", False), ("scaled_linear", True), ("squaredcos_cap_v2", False)]
)
def test_the_schedule_is_the_schedulers(
    kind: str, rescaled: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    scheduler = DDIMScheduler(
        **{**tiny.SCHEDULER, "beta_schedule": kind, "rescale_betas_zero_snr": rescaled},
        prediction_type="v_prediction",
    )
    copied = shutil.copytree(folders["sd15"], tmp_path / "copy")
    scheduler.save_pretrained(copied / "scheduler")
    folder = open_folder(copied)
    assert folder.prediction == "v_prediction"
    ours = NoiseSchedule(folder.schedule)
    np.testing.assert_allclose(ours.alpha**2, scheduler.alphas_cumprod.numpy(), rtol=0, atol=3e-6)
    assert ours.zero_terminal_snr == rescaled


def test_what_a_folder_says_of_itself(folders: dict[str, Path]) -> None:
    sd15, sdxl = open_folder(folders["sd15"]), open_folder(folders["sdxl"])
    assert (sd15.layout, sd15.prediction, sd15.scaling_factor) == ("sd", "epsilon", 0.18215)
    assert (sd15.size_px, sd15.pixels_per_latent, sd15.channels, sd15.extra_channels) == (16, 2, 4, 0)
    assert (sdxl.layout, sdxl.width, sdxl.pooled_width, sdxl.zeros_for_empty) == ("sdxl", 48, 24, True)
    assert open_folder(folders["inpaint"]).extra_channels == 5


def edit(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BROKEN = [
    ("model_index.json", {"_class_name": "FluxPipeline"}, "FluxPipeline is none of"),
    ("model_index.json", {"unet": ["diffusers", "UNet3D"]}, "unet is UNet3D"),
    ("model_index.json", {"text_encoder_2": [None, None]}, "text_encoder_2 is None"),
    (
        "model_index.json",
        {"vae": ["diffusers", "VQModel"]},
        "vae is VQModel, a sdxl pipeline needs AutoencoderKL or",
    ),
    ("model_index.json", {"requires_aesthetics_score": True}, "refiners"),
    ("unet/config.json", {"in_channels": 8}, "takes 8 channels"),
    ("unet/config.json", {"cross_attention_dim": 64}, "conditions 64 wide"),
    ("unet/config.json", {"addition_embed_type": None}, "addition_embed_type"),
    ("unet/config.json", {"projection_class_embeddings_input_dim": 7}, "is 7"),
    ("unet/config.json", {"encoder_hid_dim": 9}, "encoder_hid_dim"),
    ("vae/config.json", {"shift_factor": 0.1}, "shift_factor"),
    ("vae/config.json", {"latents_mean": [0.0] * 4}, "latents_mean"),
    ("text_encoder_2/config.json", {"max_position_embeddings": 32}, "different lengths"),
    ("text_encoder/config.json", {"use_attention_mask": True}, "use_attention_mask"),
    ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type 'flow'"),
    ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid'"),
    ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "trained_betas"),
    ("scheduler/scheduler_config.json", {"thresholding": True}, "thresholding"),
    ("scheduler/scheduler_config.json", {"beta_end": 2}, "scheduler: beta_end: Input should be less than 1"),
    ("vae/config.json", {"scaling_factor": 0}, "vae: scaling_factor is 0"),
    ("vae/config.json", {"scaling_factor": "big"}, "a config holds what it cannot"),
]


@pytest.mark.parametrize(("file", "changes", "message"), BROKEN, ids=[case[2] for case in BROKEN])
def test_wrong_parts_are_refused_by_name(
    file: str, changes: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    copied = shutil.copytree(folders["sdxl"], tmp_path / "copy", copy_function=os.link)
    (copied / file).unlink()
    shutil.copy(folders["sdxl"] / file, copied / file)
    edit(copied, file, **changes)
    with pytest.raises(TeacherError, match=re.escape(message)):
        open_folder(copied)


@pytest.mark.parametrize("missing", ["unet", "vae", "tokenizer", "text_encoder", "scheduler", "model_index.json"])
def test_missing_parts_are_refused_by_name(missing: str, folders: dict[str, Path], tmp_path: Path) -> None:
    copied = shutil.copytree(folders["sd15"], tmp_path / "copy")
    (copied / missing).unlink() if missing.endswith(".json") else shutil.rmtree(copied / missing)
    with pytest.raises(TeacherError, match=missing):
        open_folder(copied)


@pytest.mark.parametrize("kept", [(), ("tokenizer_config.json",), ("vocab.json",)], ids=["none", "config", "half"])
def test_a_tokenizer_without_words_is_refused(
    kept: tuple[str, ...], folders: dict[str, Path], tmp_path: Path
) -> None:
    copied = shutil.copytree(folders["sd15"], tmp_path / "copy")
    shutil.rmtree(copied / "tokenizer")
    (copied / "tokenizer").mkdir()
    for name in kept:
        (copied / "tokenizer" / name).write_text("{}", encoding="utf-8")
    with pytest.raises(
        TeacherError, match=r"tokenizer has neither tokenizer\.json nor vocab\.json with merges\.txt"
    ):
        open_folder(copied)


def test_a_tokenizer_of_another_model_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    copied = shutil.copytree(folders["sd15"], tmp_path / "copy")
    tokenizer = CLIPTokenizer.from_pretrained(copied / "tokenizer")
    tokenizer.add_tokens(["<my-style>"])
    tokenizer.save_pretrained(copied / "tokenizer")
    with pytest.raises(TeacherError, match=r"has 519 words, its text_encoder 518: they are not of one model"):
        PromptEncoder.load(open_folder(copied))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("unet/config.json", {"in_channels": None}, "a config holds what it cannot"),
        ("vae/config.json", {"block_out_channels": 3}, "a config holds what it cannot"),
        ("unet/config.json", {"sample_size": "large"}, "'large'"),
        ("unet/config.json", {"sample_size": 8.0}, "sample_size is 8.0; it must be the side of the latents"),
        ("unet/config.json", {"sample_size": [8, 8]}, "sample_size is [8, 8]; it must be the side of the latents"),
    ],
)
def test_configs_that_make_no_sense_are_refused(
    file: str, changes: dict[str, object], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    copied = shutil.copytree(folders["sd15"], tmp_path / "copy")
    edit(copied, file, **changes)
    with pytest.raises(TeacherError, match=re.escape(message)):
        open_folder(copied)
    config = json.loads((copied / "unet" / "config.json").read_text(encoding="utf-8"))
    del config["in_channels"]
    (copied / "unet" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(TeacherError, match="a config has no in_channels"):
        open_folder(copied)


def test_the_scale_of_latents_is_diffusers_where_an_old_config_has_none(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    copied = shutil.copytree(folders["sd15"], tmp_path / "copy")
    config = json.loads((copied / "vae" / "config.json").read_text(encoding="utf-8"))
    del config["scaling_factor"]
    (copied / "vae" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert open_folder(copied).scaling_factor == AutoencoderKL.from_pretrained(copied / "vae").config.scaling_factor
    assert open_folder(copied).scaling_factor == 0.18215


def test_pickles_are_never_opened(folders: dict[str, Path], tmp_path: Path) -> None:
    copied = shutil.copytree(folders["sd15"], tmp_path / "copy")
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(TeacherError, match=r"unet holds diffusion_pytorch_model\.bin only: pickles"):
        open_folder(copied)


def test_weights_of_a_variant_in_several_files_are_refused_by_name(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    copied = shutil.copytree(folders["sd15"], tmp_path / "copy")
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16-00001-of-00002.safetensors"))
    with pytest.raises(TeacherError, match=r"unet holds weights of a variant \(fp16\) in several files"):
        open_folder(copied)


def test_incomplete_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    copied = shutil.copytree(folders["sd15"], tmp_path / "copy")
    for part, file in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        path = copied / part / f"{file}.safetensors"
        tensors = load_file(path)
        tensors.pop(sorted(tensors)[0])
        save_file(tensors, path, metadata={"format": "pt"})
    folder = open_folder(copied)
    with pytest.raises(TeacherError, match="vae: the weights lack"):
        Autoencoder.load(folder)
    with pytest.raises(TeacherError, match="text_encoder: the weights lack"):
        PromptEncoder.load(folder)


@pytest.mark.parametrize("kept", [0, 100, 0.5], ids=["empty", "header", "half"])
def test_weights_that_were_cut_off_are_refused(kept: float, folders: dict[str, Path], tmp_path: Path) -> None:
    copied = shutil.copytree(folders["sd15"], tmp_path / "copy")
    for part, file in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        path = copied / part / f"{file}.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else int(kept)])
    folder = open_folder(copied)
    with pytest.raises(TeacherError, match="vae cannot be loaded"):
        Autoencoder.load(folder)
    with pytest.raises(TeacherError, match="text_encoder cannot be loaded"):
        PromptEncoder.load(folder)


@pytest.mark.parametrize(
    "changes", [{"hidden_act": "swoosh"}, {"num_attention_heads": 5}], ids=["unknown", "not divisible"]
)
def test_text_encoders_that_cannot_be_built_are_refused(
    changes: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    copied = shutil.copytree(folders["sd15"], tmp_path / "copy")
    edit(copied, "text_encoder/config.json", **changes)
    with pytest.raises(TeacherError, match="text_encoder cannot be loaded"):
        PromptEncoder.load(open_folder(copied))


@pytest.mark.parametrize("place", ["pytorch_lora_weights", "unet/lcm-LoRA-sdv1-5"])
def test_a_lora_beside_the_weights_is_not_ignored(place: str, folders: dict[str, Path], tmp_path: Path) -> None:
    copied = shutil.copytree(folders["sd15"], tmp_path / "copy")
    save_file({"up": torch.zeros(1)}, copied / f"{place}.safetensors")
    with pytest.raises(TeacherError, match=rf"{place}\.safetensors is a LoRA; fold it in"):
        open_folder(copied)
    (copied / f"{place}.safetensors").rename(copied / "floral.safetensors")
    open_folder(copied)


def test_a_lora_that_is_not_folded_in_is_told_from_damage(tmp_path: Path) -> None:
    pipeline = tiny.sd(tmp_path / "parts", **tiny.ONE_LEVEL)
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    pipeline.save_pretrained(tmp_path / "unfolded", safe_serialization=True)
    with pytest.raises(TeacherError, match="unet: the weights hold a LoRA beside what it changes; fold it in"):
        load_network(open_folder(tmp_path / "unfolded"))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "folded", safe_serialization=True)
    load_network(open_folder(tmp_path / "folded"))


def test_a_hub_name_is_not_looked_up(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="nothing is downloaded"):
        open_folder(tmp_path / "stable-diffusion-v1-5")


def test_half_precision_variants_load(folders: dict[str, Path], tmp_path: Path) -> None:
    copied = shutil.copytree(folders["sd15"], tmp_path / "copy")
    path = copied / "vae" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    Autoencoder.load(open_folder(copied))
