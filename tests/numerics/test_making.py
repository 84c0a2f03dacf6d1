"""The parts that a pipeline is made of, each learning alone: vocabulary, text encoder, autoencoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.progress import Progress

from distill_jobs.data.captioned import index_folder
from distill_jobs.draws import Draws
from distill_jobs.latent_sections import AutoencoderSection, TextSection
from distill_jobs.loop import Trainer
from distill_jobs.making.autoencoder import AutoencoderTraining, autoencoder_loss, difference, new_autoencoder
from distill_jobs.making.prompted import PromptedNetwork, PromptSource, new_text_encoder, token_ids
from distill_jobs.making.tokenizer import learned_tokenizer
from distill_jobs.making.words import learn_words
from distill_jobs.pipelines.vae import Encoded
from distill_jobs.processes import Processes
from distill_jobs.sections import ComputeSection, Training
from distill_jobs.signals import StopSignal
from distill_jobs.state import TrainingState
from distill_jobs.student import new_teacher
from tests.support.latent_run import PROMPTED_UNET

QUIET = Progress(disable=True)
ADVANCE = TrainingState.advance


def test_a_vocabulary_is_learned_and_nothing_is_unknown() -> None:
    captions = [f"a {colour} apple on the left" for colour in ("red", "green", "blue")] * 5
    tokenizer = learned_tokenizer(captions, 600, 24)
    assert tokenizer.tokenize("apple") == ["apple</w>"]
    assert len(tokenizer.tokenize("zebra")) > 1
    assert len(tokenizer) <= 600
    assert tokenizer.unk_token_id not in tokenizer("zebra Ж 🧀", add_special_tokens=False)["input_ids"]
    again = learned_tokenizer(captions, 600, 24)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_a_blurred_edge_costs_more_than_the_same_error_spread_evenly() -> None:
    sharp = torch.full((1, 3, 16, 16), -1.0)
    sharp[..., 8:] = 1
    blurred = torch.nn.functional.avg_pool2d(sharp, 3, 1, 1, count_include_pad=False)
    even = sharp + (blurred - sharp).abs().mean()
    plain = [float(difference(given, sharp, 0.0)) for given in (blurred, even)]
    sloped = [float(difference(given, sharp, 1.0)) for given in (blurred, even)]
    assert sloped[0] > plain[0]
    assert sloped[1] == pytest.approx(plain[1])


def test_a_wrong_hue_costs_more_than_a_wrong_brightness_and_a_far_one_more_than_two_near_ones() -> None:
    grey = torch.zeros(1, 3, 16, 16)
    tinted, lighter, far = grey.clone(), grey.clone(), grey.clone()
    tinted[:, 0], tinted[:, 1], lighter[:], far[:, 0] = 0.3, -0.3, 0.2, 0.6
    far[:, 1] = -0.6
    near, light, double = (float(difference(given, grey, 1.0)) for given in (tinted, lighter, far))
    assert light == pytest.approx(3 * 0.2)
    assert near > 2 * light
    assert double > 2 * near


def test_the_autoencoder_learns_to_give_pictures_back(tmp_path: Path) -> None:
    rows = []
    for index, colour in enumerate(("red", "gold", "green", "navy")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{index}.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "text": colour}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    entries = index_folder(tmp_path)
    section = AutoencoderSection(updates=30, block_out_channels=(8, 16), norm_num_groups=4)
    network = AutoencoderTraining(new_autoencoder(section, 16, 0))
    loss, draws = autoencoder_loss(section, entries, 16), Draws(0, "autoencoder")
    optimizer, seen = torch.optim.AdamW(network.parameters(), lr=1e-2), []
    for update in range(section.updates):
        wrong = loss(network, draws, update, 4).loss.mean()
        seen.append(float(wrong.detach()))
        optimizer.zero_grad()
        wrong.backward()
        optimizer.step()
    assert max(seen[-5:]) < 0.7 * seen[0]


def test_a_text_encoder_learns_to_guess_the_latents_of_its_captions(tmp_path: Path) -> None:
    captions = [f"a {colour} {thing}" for colour in ("red", "green", "blue") for thing in ("apple", "boat")]
    tokenizer = learned_tokenizer(captions, 600, 8)
    rows = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    source = PromptSource(
        Encoded(rows.half(), torch.zeros_like(rows).half()),
        token_ids(tokenizer, captions),
        token_ids(tokenizer, [""]),
    )
    section = TextSection(words=600, tokens=8, width=16, layers=1, heads=2)
    prompted = PromptedNetwork(new_teacher(PROMPTED_UNET, 0), new_text_encoder(section, tokenizer, 0))
    training = Training(updates=150, batch_size=6, lr=1e-2, warmup=0)
    trainer = Trainer(
        Processes(ComputeSection(), tmp_path), tmp_path / "checkpoints", 100, 1000, StopSignal(), QUIET
    )
    caught: list[float] = []

    def advance(state: TrainingState) -> Any:
        rows = ADVANCE(state)
        assert rows is not None
        caught.append(float(rows.loss.mean()))
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingState, "advance", advance)
        learn_words(tmp_path / "text", trainer, training, prompted, source, 0)
    assert caught[0] > 0.8
    assert caught[-1] < 0.1 * caught[0]
