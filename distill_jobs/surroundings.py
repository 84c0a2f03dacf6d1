"""What stands around the steps of a bundle: prompts to conditions, images to latents and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from distill_jobs.data.digits import CLASSES, LICENCE, NAMES, WIDTH, class_condition
from distill_jobs.data.source import Condition
from distill_jobs.graphs import ConditionGraph, DecodeGraph, EncodeGraph
from distill_jobs.parity import PARITY_ROWS
from distill_jobs.pipelines.graphs import LatentDecodeGraph, LatentEncodeGraph, PromptGraph
from distill_jobs.recipe import Recipe
from engines.condition import LabelClass, LabelVocabulary
from engines.manifest import ConditionSpec, Licences

TOKENIZER_FILE = "tokenizer.json"
PHRASES = (
    *("{}", "a {}", "an {}", "the {}", "digit {}", "a digit {}", "the digit {}", "number {}", "the number {}"),
    *("handwritten {}", "a handwritten {}", "handwritten digit {}", "a handwritten digit {}"),
    *("the handwritten digit {}", "a handwritten number {}", "a picture of {}", "a picture of a {}"),
    *("a picture of the digit {}", "an image of {}", "an image of the digit {}", "a drawing of {}"),
)


@dataclass(frozen=True)
class Surroundings:
    """The graphs around the steps, and what the manifest says of them.

    tokens: (PARITY_ROWS, T) int64 rows that prove the condition graph, conditions: what it makes of them;
    unpack: what a network is told, from a condition. encode_limit: of the exported encode graph's absolute error.
    scale: pixels a latent position.
    """

    condition: ConditionGraph | PromptGraph
    decode: DecodeGraph | LatentDecodeGraph
    encode: EncodeGraph | LatentEncodeGraph
    encode_limit: float
    tokens: Tensor
    conditions: Tensor
    unpack: Callable[[Tensor], Condition]
    tokenizer: str
    spec: ConditionSpec
    scale: int
    scaling_factor: float
    licences: Licences


def digits_surroundings(recipe: Recipe) -> Surroundings:
    """One-hot classes, and pixels enlarged."""
    channels, scale = int(recipe.unet["out_channels"]), recipe.export.upscale
    labels = torch.arange(PARITY_ROWS) % CLASSES
    return Surroundings(
        condition=ConditionGraph(WIDTH),
        decode=DecodeGraph(channels, scale),
        encode=EncodeGraph(channels, scale),
        encode_limit=1e-5,
        tokens=labels[:, None],
        conditions=class_condition(labels).tokens,
        unpack=Condition,
        tokenizer=vocabulary().model_dump_json(indent=1),
        spec=ConditionSpec(kind="labels", tokenizer=TOKENIZER_FILE, tokens=1, width=WIDTH),
        scale=scale,
        scaling_factor=1.0,
        licences=Licences(teacher="Apache-2.0 (trained from scratch by this recipe)", data=LICENCE),
    )


def vocabulary() -> LabelVocabulary:
    """The prompts a digits model knows."""
    classes = tuple(LabelClass(name=name, aliases=(str(i),)) for i, name in enumerate(NAMES))
    return LabelVocabulary(classes=classes, templates=PHRASES)
