"""Prompts to token ids. What a model knows is data in its bundle; an unknown prompt is an error that says so."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from engines.bundle import Bundle
from engines.errors import RequestError
from engines.manifest import Frozen


class Tokenizer(Protocol):
    """Turns a prompt into the condition graph's token row."""

    def encode(self, prompt: str) -> NDArray[np.int64]:
        """(T,) token ids. Raises: RequestError on ``prompt`` when the model cannot know it."""
        ...

    def known(self) -> tuple[str, ...]:
        """Example prompts that work, or all of them where they are few."""
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

    def known(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self._vocabulary.classes)


def load_tokenizer(bundle: Bundle) -> Tokenizer:
    """The tokenizer a bundle names."""
    return LabelTokenizer.read(bundle.file(bundle.manifest.condition.tokenizer))


def _normalise(text: str) -> str:
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"\s+", " ", folded).strip(" .!?")
