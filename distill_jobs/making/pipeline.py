"""The phases that make a teacher's pipeline: autoencoder, text encoder, then the network with both.

What they leave is a stock Stable Diffusion folder, from which the job goes on as from one that was given.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer

from distill_jobs.data.captioned import Captioned
from distill_jobs.data.framing import pixels_of
from distill_jobs.data.open import entries_of, open_source
from distill_jobs.draws import Draws
from distill_jobs.latent_sections import CaptionedData, GlyphData, GlyphFinetune, MadeTeacher
from distill_jobs.loop import Trainer
from distill_jobs.making.autoencoder import (
    AutoencoderTraining,
    autoencoder_loss,
    new_autoencoder,
    save_autoencoder,
)
from distill_jobs.making.prompted import PromptedNetwork, PromptSource, new_text_encoder, token_ids
from distill_jobs.making.tokenizer import learned_tokenizer
from distill_jobs.making.words import learn_words, with_words
from distill_jobs.phases import Phases, stands, train_into
from distill_jobs.pipelines.checks import open_folder
from distill_jobs.pipelines.folder import PipelineFolder
from distill_jobs.pipelines.sheet import contact_sheet
from distill_jobs.pipelines.teacher import load_network
from distill_jobs.pipelines.vae import Autoencoder, Encoded
from distill_jobs.recipe import Recipe
from distill_jobs.run_folder import RunFolder
from distill_jobs.stage_one import learn
from distill_jobs.state import Phase
from distill_jobs.student import new_teacher, stock_scheduler
from engines.schedule import NoiseSchedule

ENCODED_ROWS = 64
SCALED_ON = 2048
SHOWN, COLUMNS = 32, 8


def made_teacher(recipe: Recipe, folder: RunFolder, trainer: Trainer) -> PipelineFolder | None:
    """The pipeline in the run's teacher folder, made where it does not stand; None where the recipe makes none.

    Raises: DataError; RecipeError; Interrupted; DivergedError; StorageError.
    """
    if not isinstance(recipe.teacher, MadeTeacher) or not isinstance(recipe.data, CaptionedData):
        return None
    if not stands(folder.teacher, trainer.processes):
        entries = entries_of(recipe.data, recipe.seed, trainer.processes, trainer.progress)
        trainer.processes.first(lambda: folder.keep_data(folder.pictures, _identity(entries), len(entries)))
        first = folder.teacher if recipe.teacher.finetune is None else folder.begun
        if not stands(first, trainer.processes):
            making = _Making(recipe, recipe.teacher, folder, trainer, entries)
            making.autoencoder()
            making.network(first)
        if recipe.teacher.finetune is not None:
            _finetune(recipe, recipe.teacher.finetune, folder, trainer)
    return open_folder(folder.teacher)


def _finetune(recipe: Recipe, section: GlyphFinetune, folder: RunFolder, trainer: Trainer) -> None:
    """Train the network in ``folder.begun`` on pictures of the section's kinds, into the teacher's folder."""
    assert isinstance(recipe.data, GlyphData)
    begun = open_folder(folder.begun)
    data = recipe.data.model_copy(update={"pictures": section.pictures, "shares": section.shares})
    drawn = recipe.model_copy(update={"data": data})
    source = open_source(drawn, begun, trainer.processes, trainer.progress, trainer.stop)
    phases = Phases(recipe, folder, trainer, source, begun)
    learn(phases, "finetune", section, lambda: load_network(begun), folder.teacher)


def _identity(entries: Sequence[Captioned]) -> str:
    """Hash of all pictures and captions in their order."""
    return hashlib.sha256("\n".join(entry.digest() for entry in entries).encode()).hexdigest()


class _Making:
    """One pipeline being made of ``entries``."""

    def __init__(
        self,
        recipe: Recipe,
        section: MadeTeacher,
        folder: RunFolder,
        trainer: Trainer,
        entries: tuple[Captioned, ...],
    ) -> None:
        self._recipe, self._section, self._folder, self._trainer = recipe, section, folder, trainer
        self._entries = entries
        self._side = int(recipe.unet["sample_size"]) * section.autoencoder.pixels_per_latent

    def autoencoder(self) -> None:
        """Train the autoencoder, unless it stands."""
        if stands(self._folder.autoencoder, self._trainer.processes):
            return
        section, seed = self._section.autoencoder, self._recipe.seed
        network = AutoencoderTraining(new_autoencoder(section, self._side, seed))
        loss = autoencoder_loss(section, self._entries, self._side)

        def fill(staging: Path, weights: dict[str, Tensor]) -> None:
            vae = new_autoencoder(section, self._side, seed).eval()
            AutoencoderTraining(vae).load_state_dict(weights)
            some = self._entries[:: -(-len(self._entries) // SCALED_ON)]
            encoded = self._encoded(Autoencoder(vae, 1.0), some)
            noise = Draws(seed, "scaling").normal(0, tuple(encoded.mean.shape))
            save_autoencoder(vae, staging, encoded.sample(noise))
            self._reconstructions(Autoencoder(vae, 1.0)).save(staging / "reconstructions.png")

        phase = Phase("autoencoder", section, network, Draws(seed, "autoencoder"), loss)
        train_into(self._folder.autoencoder, self._trainer, phase, fill)

    def network(self, folder: Path) -> None:
        """Train network and text encoder together into ``folder``."""
        recipe, text = self._recipe, self._section.text
        vae = AutoencoderKL.from_pretrained(self._folder.autoencoder, use_safetensors=True).eval()
        vae.register_to_config(_name_or_path="")  # else where it was read from is part of what is written
        autoencoder = Autoencoder(vae, float(vae.config.scaling_factor)).to(self._trainer.processes.device)
        captions = [entry.caption for entry in self._entries]
        tokenizer = learned_tokenizer(captions, text.words, text.tokens)
        share = -(-len(self._entries) // self._trainer.processes.count)
        task = self._trainer.progress.add_task("latents", total=share, loss="")
        source = PromptSource(
            self._encoded_by_all(autoencoder, lambda n: self._trainer.progress.advance(task, n)),
            token_ids(tokenizer, captions),
            token_ids(tokenizer, [""]),
        )

        def start() -> PromptedNetwork:
            encoder = new_text_encoder(text, tokenizer, recipe.seed)
            return PromptedNetwork(new_teacher(recipe.unet, recipe.seed), encoder)

        def taught() -> PromptedNetwork:
            return start() if text.training is None else with_words(start(), self._folder.text_encoder)

        def save(staging: Path, network: PromptedNetwork) -> UNet2DConditionModel:
            save_pipeline(staging, network, vae.cpu(), tokenizer, recipe)
            return network.unet

        phases = Phases(recipe, self._folder, self._trainer, source)
        if text.training is not None and not stands(self._folder.text_encoder, self._trainer.processes):
            learn_words(self._folder.text_encoder, self._trainer, text.training, start(), source, recipe.seed)
        learn(phases, "teacher", self._section, taught, folder, save)

    @torch.inference_mode()
    def _reconstructions(self, autoencoder: Autoencoder) -> Image.Image:
        """Some pictures, each row of them above the one of what comes back."""
        shown = pixels_of(self._entries[-SHOWN:], self._side)
        back = autoencoder.decode(autoencoder.encode(shown).mean)
        pairs = zip(torch.split(shown, COLUMNS), torch.split(back, COLUMNS), strict=True)
        return contact_sheet([row for pair in pairs for row in pair])

    @torch.inference_mode()
    def _encoded(
        self,
        autoencoder: Autoencoder,
        entries: tuple[Captioned, ...],
        advance: Callable[[int], None] = lambda n: None,
    ) -> Encoded:
        """Float16 latents of all entries, on the CPU."""
        device, parts = next(autoencoder.parameters()).device, []
        for first in range(0, len(entries), ENCODED_ROWS):
            rows = entries[first : first + ENCODED_ROWS]
            parts.append(autoencoder.encode(pixels_of(rows, self._side).to(device)))
            advance(len(rows))
        means, deviations = ([getattr(part, name).half().cpu() for part in parts] for name in ("mean", "std"))
        return Encoded(torch.cat(means), torch.cat(deviations))

    def _encoded_by_all(self, autoencoder: Autoencoder, advance: Callable[[int], None]) -> Encoded:
        """Those of all entries, of which every process computes its share."""
        processes, entries = self._trainer.processes, self._entries
        share = -(-len(entries) // processes.count)
        first = share * processes.index
        mine = tuple(entries[min(row, len(entries) - 1)] for row in range(first, first + share))
        own = self._encoded(autoencoder, mine, advance)
        parts = (processes.gathered(part.to(processes.device)).cpu() for part in (own.mean, own.std))
        return Encoded(*(part[: len(entries)] for part in parts))


def save_pipeline(
    folder: Path, network: PromptedNetwork, vae: AutoencoderKL, tokenizer: CLIPTokenizer, recipe: Recipe
) -> None:
    """Write a stock Stable Diffusion folder."""
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=network.text.train(False),
        tokenizer=tokenizer,
        unet=network.unet.eval(),
        scheduler=stock_scheduler(NoiseSchedule(recipe.schedule), None),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)
