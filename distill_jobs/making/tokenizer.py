"""A CLIP tokenizer whose vocabulary is learned from captions; any other text is spelt out in bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"


def learned_tokenizer(captions: Iterable[str], words: int, tokens: int) -> CLIPTokenizer:
    """Byte pairs of ``captions``. words: size of the vocabulary, at most; tokens: of a prompt.

    Words are cut and spelt as CLIP does, and the vocabulary stands in its order: bytes, bytes that end a word, what
    was merged, start and end.
    """
    letters = sorted(ByteLevel.alphabet())
    base = [*letters, *(letter + END_OF_WORD for letter in letters)]
    stock = _tokenizer(base, [], tokens).backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    learner.normalizer, learner.pre_tokenizer = stock.normalizer, stock.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=words - 2,
        initial_alphabet=letters,
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = [(str(one), str(other)) for one, other in json.loads(learner.to_str())["model"]["merges"]]
    return _tokenizer(base, merges[: words - 2 - len(base)], tokens)


def _tokenizer(base: list[str], merges: list[tuple[str, str]], tokens: int) -> CLIPTokenizer:
    vocabulary = dict.fromkeys([*base, *(one + other for one, other in merges), START, END])
    numbered = {word: index for index, word in enumerate(vocabulary)}
    pairs: Any = merges  # declared as strings, which the library itself does not take
    return CLIPTokenizer(vocab=numbered, merges=pairs, model_max_length=tokens)
