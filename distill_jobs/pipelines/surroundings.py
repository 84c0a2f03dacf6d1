"""What stands around the steps of a latent bundle, from a run's own pipeline folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from distill_jobs.errors import RecipeError
from distill_jobs.latent_sections import CaptionedData, LatentTeacher
from distill_jobs.parity import PARITY_ROWS
from distill_jobs.pipelines.checks import open_folder
from distill_jobs.pipelines.folder import PipelineFolder
from distill_jobs.pipelines.graphs import LatentDecodeGraph, LatentEncodeGraph, PromptGraph
from distill_jobs.pipelines.packing import Packing
from distill_jobs.pipelines.text import PromptEncoder
from distill_jobs.pipelines.tiny_decoder import load_decoder
from distill_jobs.pipelines.vae import Autoencoder
from distill_jobs.recipe import Recipe
from distill_jobs.run_folder import RunFolder
from distill_jobs.surroundings import TOKENIZER_FILE, Surroundings
from engines.condition import ClipTokenizer
from engines.manifest import ConditionSpec, DecoderKind, Licences

WORDS = ["a", "photograph", "of", "a", "red", "fox", "in", "the", "snow,", "seen", "from", "above", "at", "dusk"]

ENCODE_LIMIT = 5e-4
"""1e-4 of the largest latents, which reach 5; measured: 9e-5 for SD 1.5's autoencoder at 512²."""


def latent_surroundings(run_dir: Path, recipe: Recipe, decoder: DecoderKind) -> Surroundings:
    """The text encoders and the autoencoder of the run's teacher, and the recipe's prompts to show.

    decoder: tiny for the run's own tiny one. Raises: TeacherError; RecipeError, also where a prompt is too long for
    the model or the recipe has no such decoder; JobError where that is not trained.
    """
    teacher, data = recipe.teacher, recipe.data
    if not isinstance(teacher, LatentTeacher) or not isinstance(data, CaptionedData):
        raise RecipeError("only a run whose teacher is a pipeline has text encoders and an autoencoder")
    licences = Licences(teacher=teacher.licence, data=data.licence)
    around, prompts = surroundings_of(open_folder(RunFolder(run_dir).teacher), licences), recipe.export.prompts
    try:
        ClipTokenizer(around.tokenizer, around.spec.tokens, prompts)
    except ValueError as error:
        raise RecipeError(f"recipe {recipe.name}: export.prompts: {error}") from None
    around = replace(around, spec=around.spec.model_copy(update={"examples": prompts}))
    if decoder == "own":
        return around
    if recipe.decoder is None:
        raise RecipeError(f"recipe {recipe.name} has no decoder section, so no tiny decoder to export")
    return replace(around, decode=LatentDecodeGraph(load_decoder(RunFolder(run_dir).decoder)))


def surroundings_of(folder: PipelineFolder, licences: Licences) -> Surroundings:
    """The text encoders and the autoencoder of a pipeline folder. Raises: TeacherError."""
    prompts, autoencoder, packing = PromptEncoder.load(folder), Autoencoder.load(folder), Packing.of(folder)
    condition = PromptGraph(prompts.encoders, packing)
    rows = [prompts.tokenizer.cut(" ".join(WORDS[: i % (len(WORDS) + 1)])) for i in range(PARITY_ROWS)]
    tokens = torch.stack([torch.from_numpy(row) for row in rows])
    with torch.no_grad():
        conditions = condition(tokens)
    return Surroundings(
        condition=condition,
        decode=LatentDecodeGraph(autoencoder),
        encode=LatentEncodeGraph(autoencoder),
        encode_limit=ENCODE_LIMIT,
        tokens=tokens,
        conditions=conditions,
        unpack=packing.unpack,
        tokenizer=prompts.tokenizer.dump(),
        spec=ConditionSpec(kind="clip", tokenizer=TOKENIZER_FILE, tokens=packing.tokens, width=packing.width),
        scale=folder.pixels_per_latent,
        scaling_factor=folder.scaling_factor,
        licences=licences,
    )
