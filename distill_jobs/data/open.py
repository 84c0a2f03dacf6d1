"""From a recipe to its data."""

from __future__ import annotations

from distill_jobs.data.digits import Digits, DigitsSource
from distill_jobs.data.source import Source
from distill_jobs.recipe import Recipe


def open_source(recipe: Recipe) -> Source:
    """The source that ``recipe.data`` names."""
    match recipe.data:
        case "digits":
            return DigitsSource(Digits.load())
