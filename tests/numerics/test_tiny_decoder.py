"""The tiny decoder: of the published size, learns what the autoencoder says, and says how far it is from it."""

from __future__ import annotations

import math

import pytest
import torch

from distill_jobs.contenders import STUDENT
from distill_jobs.costs import NetworkCost, decoder_costs
from distill_jobs.errors import RecipeError
from distill_jobs.latent_sections import DecoderSection
from distill_jobs.making.autoencoder import difference
from distill_jobs.pipelines.decoders import ERROR, PSNR, WITH_TINY, compared, decoder_gates
from distill_jobs.pipelines.tiny_decoder import TinyDecoder, new_tiny
from distill_jobs.pipelines.vae import Autoencoder
from distill_jobs.plan import plan_of
from distill_jobs.recipe_file import read_recipe
from engines.manifest import EvaluationRow, Measured
from tests.support import tiny_pipelines as tiny

SMALL = DecoderSection(updates=60, width=16, blocks=1)


def test_it_is_of_the_published_size_and_a_fraction_of_the_autoencoders_cost() -> None:
    """TAESD's decoder: 1.22 million parameters; Stable Diffusion's decodes 512 x 512 with 2.5 TFLOP."""
    small, full = decoder_costs(DecoderSection(updates=1), None, 64)
    assert small.parameters == 1_222_531
    assert full.parameters == 83_653_863
    assert full.flops == pytest.approx(2.5e12, rel=0.05)
    assert small.flops < full.flops / 15


def test_it_learns_to_decode_as_the_autoencoder_does() -> None:
    torch.manual_seed(0)
    teacher = Autoencoder(tiny.vae().eval(), 0.18215)
    network = TinyDecoder(new_tiny(SMALL, teacher.channels, teacher.pixels_per_latent, 0))
    optimizer, latents = torch.optim.AdamW(network.parameters(), lr=3e-3), torch.randn(8, 4, 8, 8)
    with torch.no_grad():
        wanted = teacher.decode(latents).clamp(-1, 1)
        before = compared(network.decode(latents), wanted)
    for _ in range(SMALL.updates):
        optimizer.zero_grad()
        difference(network(latents), wanted, SMALL.gradient).mean().backward()
        optimizer.step()
    with torch.no_grad():
        after = compared(network.decode(latents), wanted)
    assert after[ERROR] < 0.5 * before[ERROR]
    assert after[PSNR] > before[PSNR] + 6
    assert network.decode(latents).shape == wanted.shape


def test_checkpointed_it_learns_the_same() -> None:
    latents, gradients = torch.randn(2, 4, 8, 8), list[torch.Tensor]()
    for checkpointed in (False, True):
        network = TinyDecoder(new_tiny(SMALL, 4, 8, 0)).train()
        if checkpointed:
            network.enable_gradient_checkpointing()
        network(latents).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_pictures_are_compared_as_they_are_shown() -> None:
    wanted = torch.full((2, 3, 4, 4), -1.0)
    found = compared(wanted + 0.2, wanted)
    assert found == {ERROR: pytest.approx(0.2), PSNR: pytest.approx(10 * math.log10(4 / 0.04))}
    assert compared(wanted - 0.5, wanted) == {ERROR: 0.0}


def test_a_decoder_that_loses_the_picture_misses_its_gates() -> None:
    def row(model: str, **metrics: float) -> EvaluationRow:
        values = {name: Measured.of([value]) for name, value in metrics.items()}
        return EvaluationRow(model=model, steps=4, evaluations=4, guidance_scale=4, metrics=values)

    rows = [
        row(STUDENT, decoder_error=0, decoder_data_psnr=26, glyph_top_1=0.9, frechet_distance=0.1),
        row(
            WITH_TINY.format(STUDENT),
            decoder_psnr=30,
            decoder_data_psnr=25,
            glyph_top_1=0.5,
            frechet_distance=0.105,
        ),
    ]
    assert [gate.passed for gate in decoder_gates(rows, "teacher")] == [True, True, False]
    assert [gate.passed for gate in decoder_gates(rows, "data")] == [False, True, False]
    assert not list(decoder_gates(rows[:1], "teacher"))


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("digits", ["decoder={updates: 1}"], "decoder is for teachers that work on latents"),
        ("sd15", ["decoder={updates: 1}", "compute.shard=true"], "cannot go with decoder"),
    ],
)
def test_a_decoder_without_place_is_refused(recipe: str, changes: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe(recipe, changes)


def test_its_phase_is_the_last_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill_jobs.plan.network_cost", lambda config: NetworkCost(1, 1.0))
    plan = plan_of(read_recipe("emoji", ["decoder={updates: 7, width: 32}"]))
    last = plan.phases[-1]
    assert (last.name, last.training.updates, last.frozen_passes) == ("decoder", 7, 1)
    assert last.frozen is not None
    assert last.trained.flops < last.frozen.flops / 2
