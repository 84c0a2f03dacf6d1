"""Prompts to token ids. What a model knows is data in its bundle; an unknown prompt is an error that says so."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray
from pydantic import Field

from engines.bundle import Bundle
from engines.errors import BundleError, RequestError
from engines.manifest import Frozen

CLIP_EXAMPLES = ("a photograph of a red fox in the snow", "a watercolour of a lighthouse at dusk", "a fox", "x")
"""Prompts to show, warm and compare engines with, for a text model that brings none; it knows far more."""


class Tokenizer(Protocol):
    """Turns a prompt into the condition graph's token row."""

    def encode(self, prompt: str) -> NDArray[np.int64]:
        """(T,) token ids. Raises: RequestError on ``prompt`` when the model cannot know it."""
        ...

    def count(self, prompt: str) -> int:
        """Tokens of a prompt that ``encode`` takes, both marks included, padding not."""
        ...

    def known(self) -> tuple[str, ...]:
        """Example prompts that work, or all of them where they are few."""
        ...

    def reads_all_of(self, other: Tokenizer) -> bool:
        """Whether every prompt that ``other`` takes works here."""
        ...


class LabelClass(Frozen):
    """A class and the other words for it."""

    name: str
    aliases: tuple[str, ...] = ()


class LabelVocabulary(Frozen):
    """The tokenizer file of a class-conditional model. templates: phrases with ``{}`` where the class stands."""

    classes: tuple[LabelClass, ...] = Field(min_length=1)
    templates: tuple[str, ...] = ("{}",)


class LabelTokenizer:
    """Phrases naming one class, as one token: the class index."""

    def __init__(self, vocabulary: LabelVocabulary) -> None:
        self._vocabulary = vocabulary
        self._ids: dict[str, int] = {}
        for index, entry in enumerate(vocabulary.classes):
            for word in (entry.name, *entry.aliases):
                for template in vocabulary.templates:
                    self._ids[_normalise(template.replace("{}", word))] = index

    @classmethod
    def read(cls, path: Path) -> LabelTokenizer:
        return cls(LabelVocabulary.model_validate_json(path.read_bytes()))

    def encode(self, prompt: str) -> NDArray[np.int64]:
        index = self._ids.get(_normalise(prompt))
        if index is None:
            examples = [t.replace("{}", self._vocabulary.classes[0].name) for t in self._vocabulary.templates]
            message = (
                f"This model does not know that prompt. It knows {', '.join(self.known())}; "
                f"phrases such as {', '.join(repr(e) for e in examples[:4])} work."
            )
            raise RequestError("prompt", "unknown_prompt", message)
        return np.array([index], dtype=np.int64)

    def count(self, prompt: str) -> int:
        return 1

    def known(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self._vocabulary.classes)

    def reads_all_of(self, other: Tokenizer) -> bool:
        return isinstance(other, LabelTokenizer) and other._ids.keys() <= self._ids.keys()


class ClipTokenizer:
    """Any text, as CLIP's byte-pair tokens between a start and an end, padded to a fixed length.

    text: a ``tokenizer.json`` that adds start, end and padding; length: tokens of a row, both marks included;
    examples: prompts to show. A special token spelt in a prompt is plain text. Raises: ValueError when the file is
    no tokenizer of this kind, or an example is too long.
    """

    def __init__(self, text: str, length: int, examples: Sequence[str] = ()) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare exceptions
            raise ValueError(f"not a tokenizer file: {error}") from None
        self._tokenizer.encode_special_tokens = True
        self._text, self._length = text, length
        if len(self._tokenizer.encode("").ids) != length:
            raise ValueError(f"the tokenizer does not pad to {length} tokens")
        if too_long := next((example for example in examples if not self._fits(example)), None):
            raise ValueError(f"the example {too_long!r} is longer than the {length - 2} tokens of a prompt")
        self._examples = tuple(examples) or tuple(filter(self._fits, CLIP_EXAMPLES))[:2]

    @classmethod
    def read(cls, path: Path, length: int, examples: Sequence[str] = ()) -> ClipTokenizer:
        return cls(path.read_text(encoding="utf-8"), length, examples)

    def encode(self, prompt: str) -> NDArray[np.int64]:
        ids = self._tokenizer.encode(prompt).ids
        if len(ids) > self._length:
            message = f"prompt is {len(ids) - 2} tokens long; this model reads at most {self._length - 2}."
            raise RequestError("prompt", "prompt_too_long", message)
        return np.array(ids, dtype=np.int64)

    def count(self, prompt: str) -> int:
        return sum(self._tokenizer.encode(prompt).attention_mask)

    def cut(self, prompt: str) -> NDArray[np.int64]:
        """As ``encode``, but the end of a prompt that is too long is left out: for captions."""
        ids = self._tokenizer.encode(prompt).ids
        return np.array([*ids[: self._length - 1], ids[-1]], dtype=np.int64)

    def known(self) -> tuple[str, ...]:
        return self._examples

    def _fits(self, prompt: str) -> bool:
        return len(self._tokenizer.encode(prompt).ids) <= self._length

    def reads_all_of(self, other: Tokenizer) -> bool:
        return isinstance(other, ClipTokenizer) and (other._text, other._length) == (self._text, self._length)

    def dump(self) -> str:
        """The tokenizer's file."""
        return self._text


def load_tokenizer(bundle: Bundle) -> Tokenizer:
    """The tokenizer a bundle names. Raises: BundleError when its file is none of the named kind."""
    spec = bundle.manifest.condition
    file = bundle.file(spec.tokenizer)
    try:
        if spec.kind == "labels":
            return LabelTokenizer.read(file)
        return ClipTokenizer.read(file, spec.tokens, spec.examples)
    except ValueError as error:
        raise BundleError(f"{file} is not a tokenizer of kind {spec.kind}: {error}") from None


def _normalise(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"\s+", " ", folded).strip(" .!?")
