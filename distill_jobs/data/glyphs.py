"""Colour emoji with their names: the bitmaps of a font, and Unicode's list of what each sequence is called.

Font: Noto Color Emoji (SIL OFL 1.1), bitmaps of 136×128 pixels. A sequence such as a flag or a family is one glyph
of it, found by the font's own substitutions. Names, groups and subgroups: emoji-test.txt of Unicode Technical
Standard #51.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from distill_jobs.data.colours import colour_of, is_colourful
from distill_jobs.errors import DataError

BITMAP_PX = 109
"""The one size, in pixels an em, at which the font has bitmaps."""

INK = (0, 0, 0, 255)
NO_COLOUR = ((0, 0),) * 3
"""Extrema of a picture that has nothing but ink: an outline of a font without colour."""

FONT_PACKAGE, NAMES_PACKAGE, LAYOUT_PACKAGE = "fonts-noto-color-emoji", "unicode-data", "libfribidi0"

_LINE = re.compile(r"^(?P<points>[0-9A-F ]+); fully-qualified +# \S+ E[0-9.]+ (?P<name>.+)$")
_HEADING = re.compile(r"^# (?P<kind>group|subgroup): (?P<name>.+)$")
_JOINED = {"flag": "flag of {}", "keycap": "keycap {}"}


@dataclass(frozen=True)
class EmojiName:
    """A sequence of code points, what people call it, and Unicode's classes of it."""

    text: str
    name: str
    group: str
    subgroup: str


@dataclass(frozen=True)
class Glyph:
    """An emoji and its picture: RGBA, cut to what is drawn."""

    about: EmojiName
    picture: Image.Image

    @property
    def name(self) -> str:
        return self.about.name

    @cached_property
    def colour(self) -> str | None:
        """The word for its colour, where one dominates."""
        return colour_of(self.picture)

    @cached_property
    def colourful(self) -> bool:
        """Whether enough of it has a colour for another one to show."""
        return is_colourful(self.picture)


def read_names(file: Path) -> tuple[EmojiName, ...]:
    """The emoji of an emoji-test.txt in its order, those with a skin tone left out.

    Raises: DataError when the file is missing or lists none.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"data.names: {file} is not there; Debian's {NAMES_PACKAGE} has emoji-test.txt") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.names: {file} cannot be read as UTF-8 text: {error}") from None
    found = tuple(_parsed(lines))
    if not found:
        raise DataError(f"data.names: {file} lists no fully-qualified emoji; give Unicode's emoji-test.txt")
    return found


def read_glyphs(font: Path, names: tuple[EmojiName, ...]) -> tuple[Glyph, ...]:
    """The pictures of those names for which the font has a single glyph, in their order.

    Raises: DataError when the font is missing or has no colour bitmaps, or sequences cannot be resolved.
    """
    if not font.is_file():
        raise DataError(f"data.font: {font} is not there; Debian's {FONT_PACKAGE} has NotoColorEmoji.ttf")
    if not features.check("raqm"):
        raise DataError(
            f"sequences of emoji cannot be resolved: Pillow finds no FriBiDi; Debian's {LAYOUT_PACKAGE} has it"
        )
    try:
        face = ImageFont.truetype(font, BITMAP_PX, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise DataError(f"data.font: {font} has no bitmaps of {BITMAP_PX} pixels: {error}") from None
    drawn = ((about, _picture(face, about.text)) for about in names)
    found = tuple(Glyph(about, picture) for about, picture in drawn if picture is not None)
    if not found:
        raise DataError(f"data.font: {font} has a colour bitmap for none of the names")
    return found


def _parsed(lines: list[str]) -> Iterator[EmojiName]:
    group = subgroup = ""
    for line in lines:
        if heading := _HEADING.match(line):
            group, subgroup = (heading["name"], "") if heading["kind"] == "group" else (group, heading["name"])
        elif (entry := _LINE.match(line)) and "skin tone" not in entry["name"]:
            text = "".join(chr(int(point, 16)) for point in entry["points"].split())
            yield EmojiName(text, _spoken(entry["name"]), group, subgroup)


def _spoken(name: str) -> str:
    """As in a sentence: ``flag: Japan`` is the flag of Japan, ``man: beard`` a man with beard."""
    kind, separator, rest = name.partition(": ")
    return _JOINED.get(kind, kind + " with {}").format(rest) if separator else name


def _picture(face: ImageFont.FreeTypeFont, text: str) -> Image.Image | None:
    """The one colour glyph of a sequence; None where the font has several for it, none, or none in colour."""
    left, top, right, bottom = map(int, face.getbbox(text))
    if bottom <= top or face.getlength(text) > 1.5 * BITMAP_PX:
        return None
    canvas = Image.new("RGBA", (right - left, bottom - top))
    ImageDraw.Draw(canvas).text((-left, -top), text, font=face, embedded_color=True, fill=INK)
    box = canvas.getbbox()
    return canvas.crop(box) if box and canvas.convert("RGB").getextrema() != NO_COLOUR else None
