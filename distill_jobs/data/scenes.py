"""Captioned pictures made of glyphs: one as it is, small and to one side, in another colour, or two side by side.

Every picture is a function of (seed, index). What is held out is decided by the words alone, so that it stays
held out however many pictures are made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np
from PIL import Image

from distill_jobs.data.colours import HUES, recoloured
from distill_jobs.data.glyphs import Glyph
from distill_jobs.errors import DataError
from distill_jobs.latent_sections import Shares

T = TypeVar("T")

STILL = 0.75
"""Share of the glyphs alone, as they are or in another colour, that stand where the reference does: a shape that is
always the same is learned sharp, one that never is stays an average."""

PHRASES = ("{}", "{}", "{} emoji", "an emoji of {}", "a picture of {}", "emoji, {}")
PAIR_PHRASES = ("{} and {}", "{} next to {}", "{} beside {}", "{} on the left and {} on the right")
WITH_GROUP, WITH_COLOUR = 0.15, 0.1
PLACES = (("top left", "top", "top right"), ("left", "", "right"), ("bottom left", "bottom", "bottom right"))
"""Words for a place, by row and column."""

FULL, SMALL, HALF = (0.84, 0.96), (0.4, 0.62), (0.38, 0.47)
"""Ranges of a glyph's longer side, as a share of the picture's, alone, placed, and in a pair."""


@dataclass(frozen=True)
class Scene:
    """An RGB picture, what it shows in words, and the names in it; colour: the word of a recoloured glyph."""

    picture: Image.Image
    caption: str
    names: tuple[str, ...]
    colour: str | None = None


@dataclass(frozen=True)
class Held:
    """What training never sees, by words. glyphs: share of the names; compositions: of recolourings and pairs."""

    seed: int
    glyphs: float
    compositions: float

    def glyph(self, name: str) -> bool:
        return self._fraction("glyph", name) < self.glyphs

    def composition(self, *words: str) -> bool:
        """Of a colour and a name, or of the two names of a pair from left to right."""
        return self._fraction("composition", *words) < self.compositions

    def _fraction(self, *words: str) -> float:
        digest = hashlib.sha256("\n".join((str(self.seed), *words)).encode()).digest()
        return float(int.from_bytes(digest[:8], "big")) / 2.0**64


@dataclass(frozen=True)
class Scenes:
    """The pictures of a data set, by index. side: of pictures, in pixels; shares: of the kinds of them."""

    glyphs: Sequence[Glyph]
    held: Held
    side: int
    shares: Shares = field(default_factory=Shares)

    @cached_property
    def seen(self) -> tuple[Glyph, ...]:
        """The glyphs that are not held out. Raises: DataError when they are fewer than two."""
        seen = tuple(glyph for glyph in self.glyphs if not self.held.glyph(glyph.name))
        if len(seen) < 2:
            raise DataError(f"data: of {len(self.glyphs)} glyphs only {len(seen)} are for training; it takes two")
        return seen

    def scene(self, index: int) -> Scene:
        """The first pictures show each glyph as it is; after those every kind of scene comes up."""
        rng = np.random.Generator(np.random.Philox(key=np.array([self.held.seed, index], np.uint64)))
        glyph, kind, shares = self.seen[index % len(self.seen)], rng.random(), self.shares
        if index < len(self.seen) or kind < shares.plain:
            return self.plain(glyph, rng)
        if kind < shares.plain + shares.placed:
            return self._placed(glyph, rng)
        if kind < shares.plain + shares.placed + shares.recoloured:
            colours = [c for c in colours_for(glyph) if not self.held.composition(c, glyph.name)]
            return self.recoloured(glyph, _one(rng, colours), rng) if colours else self.plain(glyph, rng)
        others = [self.seen[int(i)] for i in rng.integers(len(self.seen), size=8)]
        fits = [other for other in others if not self.held.composition(glyph.name, other.name)]
        return self.pair(glyph, _one(rng, fits), rng) if fits else self.plain(glyph, rng)

    def single(self, glyph: Glyph, rng: np.random.Generator) -> Scene:
        """One glyph alone: as it is, in any colour that it can have, placed, or as one half of a pair shows it."""
        colours, kind = colours_for(glyph), rng.random()
        if kind < 0.25:
            return self.recoloured(glyph, _one(rng, colours), rng) if colours else self.plain(glyph, rng)
        if kind < 0.5:
            return self._placed(glyph, rng)
        return self._halved(glyph, rng) if kind < 0.75 else self.plain(glyph, rng)

    def reference(self, glyph: Glyph) -> Image.Image:
        """A glyph as it is, in the middle."""
        canvas = self._canvas()
        self._paste(canvas, glyph.picture, sum(FULL) / 2, 0.5, 0.5)
        return canvas

    def plain(self, glyph: Glyph, rng: np.random.Generator) -> Scene:
        words, natural = glyph.name, glyph.colour
        if natural and natural not in words.split() and rng.random() < WITH_COLOUR:
            words = f"{natural} {words}"
        return Scene(self._alone(glyph.picture, rng), self._told(words, glyph, rng), (glyph.name,))

    def recoloured(self, glyph: Glyph, colour: str, rng: np.random.Generator) -> Scene:
        caption = self._told(f"{colour} {glyph.name}", glyph, rng)
        return Scene(self._alone(recoloured(glyph.picture, colour), rng), caption, (glyph.name,), colour)

    def pair(self, left: Glyph, right: Glyph, rng: np.random.Generator) -> Scene:
        canvas = self._canvas()
        for glyph, x in ((left, 0.26), (right, 0.74)):
            self._paste(canvas, glyph.picture, rng.uniform(*HALF), x, 0.5 + rng.uniform(-0.05, 0.05))
        caption = _one(rng, PAIR_PHRASES).format(left.name, right.name)
        return Scene(canvas, caption, (left.name, right.name))

    def _placed(self, glyph: Glyph, rng: np.random.Generator) -> Scene:
        canvas, size = self._canvas(), rng.uniform(*SMALL)
        x, y = (int(i) for i in rng.integers(3, size=2))
        middles = [size / 2 + 0.02 + (1 - size - 0.04) * (part / 2) for part in (x, y)]
        self._paste(canvas, glyph.picture, size, *middles)
        words = [f"small {glyph.name}", *([place] if (place := PLACES[y][x]) else ())]
        return Scene(canvas, ", ".join(words), (glyph.name,))

    def _halved(self, glyph: Glyph, rng: np.random.Generator) -> Scene:
        canvas = self._canvas()
        self._paste(canvas, glyph.picture, rng.uniform(*HALF), *(0.5 + rng.uniform(-0.05, 0.05, size=2)))
        return Scene(canvas, glyph.name, (glyph.name,))

    def _told(self, words: str, glyph: Glyph, rng: np.random.Generator) -> str:
        phrase = _one(rng, PHRASES).format(words)
        group = group_words(glyph.about.subgroup)
        return f"{phrase}, {group}" if rng.random() < WITH_GROUP else phrase

    def _alone(self, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        canvas = self._canvas()
        if rng.random() < STILL:
            self._paste(canvas, picture, sum(FULL) / 2, 0.5, 0.5)
            return canvas
        x, y = 0.5 + rng.uniform(-0.02, 0.02, size=2)
        self._paste(canvas, picture, rng.uniform(*FULL), x, y)
        return canvas

    def _canvas(self) -> Image.Image:
        return Image.new("RGB", (self.side, self.side), "white")

    def _paste(self, canvas: Image.Image, picture: Image.Image, size: float, x: float, y: float) -> None:
        """size: of the longer side; x, y: of the middle; all as shares of the canvas."""
        shrink = size * self.side / max(picture.size)
        wide, high = (max(1, round(length * shrink)) for length in picture.size)
        small = picture.resize((wide, high), Image.Resampling.LANCZOS)
        canvas.paste(small, (round(x * self.side - wide / 2), round(y * self.side - high / 2)), small)


def colours_for(glyph: Glyph) -> tuple[str, ...]:
    """The colours that a glyph can be given: none for flags and people, whose colours are what they are."""
    kept = glyph.about.group == "Flags" or glyph.about.subgroup.startswith(("person", "family"))
    if kept or not glyph.colourful or set(HUES) & set(glyph.name.split()):
        return ()
    return tuple(colour for colour in HUES if colour != glyph.colour)


def group_words(subgroup: str) -> str:
    """A subgroup as words: ``animal-mammal`` is animal mammal."""
    return subgroup.replace("-", " ").replace("&", "and")


def _one(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]
