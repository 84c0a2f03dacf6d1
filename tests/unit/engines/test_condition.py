"""Prompts to tokens: what a model knows is found in any spelling, and what it does not know it says."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.bundle import Bundle
from engines.condition import ClipTokenizer, LabelClass, LabelTokenizer, LabelVocabulary, load_tokenizer
from engines.errors import RequestError
from tests.support.serving import ROOT
from tests.support.toy_bundle import DIGITS

EMOJI = Path(ROOT, "server/bundles/emoji/tokenizer.json")


@pytest.fixture(scope="module")
def cafe() -> LabelTokenizer:
    classes = (LabelClass(name="café", aliases=("☕",)), LabelClass(name="straße"))
    return LabelTokenizer(LabelVocabulary(classes=classes, templates=("{}", "a {}")))


@pytest.mark.parametrize("index", range(10))
def test_names_aliases_and_templates_name_the_class(toy: Bundle, index: int) -> None:
    tokenizer = load_tokenizer(toy)
    for prompt in (DIGITS[index], str(index), f"the digit {DIGITS[index]}", f"a handwritten {index}"):
        token = tokenizer.encode(prompt)
        assert token.dtype == np.int64
        assert token.tolist() == [index]


@given(
    index=st.integers(0, 9),
    upper=st.booleans(),
    space=st.text(" \t\n\u00a0\u3000", min_size=1, max_size=3),
    end=st.text(" .!?", max_size=3),
)
def test_case_space_and_end_marks_do_not_matter(toy: Bundle, index: int, upper: bool, space: str, end: str) -> None:
    phrase = f"{space}The{space}digit{space}{DIGITS[index]}{end}"
    assert load_tokenizer(toy).encode(phrase.upper() if upper else phrase)[0] == index


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_composed_and_decomposed_letters_are_one(cafe: LabelTokenizer, form: str) -> None:
    assert cafe.encode(unicodedata.normalize(form, "a CAFÉ"))[0] == 0  # type: ignore[arg-type]


def test_emoji_and_full_width_and_sharp_s(cafe: LabelTokenizer) -> None:
    assert cafe.encode("☕")[0] == 0
    assert cafe.encode("ａ ｃａｆé")[0] == 0
    assert cafe.encode("STRASSE")[0] == 1


@given(prompt=st.text(max_size=40).filter(lambda text: not any(c.isalnum() for c in text)))
def test_any_other_prompt_is_told_what_the_model_knows(toy: Bundle, prompt: str) -> None:
    with pytest.raises(RequestError) as caught:
        load_tokenizer(toy).encode(prompt)
    assert (caught.value.param, caught.value.code) == ("prompt", "unknown_prompt")
    assert ", ".join(DIGITS) in str(caught.value)
    assert "'the digit zero'" in str(caught.value)


def test_the_refused_prompt_is_not_echoed(toy: Bundle) -> None:
    with pytest.raises(RequestError) as caught:
        load_tokenizer(toy).encode("a canary phrase")
    assert "canary" not in str(caught.value)


def test_tokens_are_counted_without_the_padding(cafe: LabelTokenizer) -> None:
    clip = ClipTokenizer.read(EMOJI, 24)
    assert len(clip.encode("fox")) == 24
    assert clip.count("fox") == 4
    assert clip.count("fox fox") == 6, "the marks are there once"
    assert cafe.count("a café") == 1
