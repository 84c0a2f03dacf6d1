"""The colour words of captions: what colour a picture has, and the same picture in another."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

HUES = {"red": 0, "orange": 28, "yellow": 50, "green": 120, "blue": 215, "purple": 272, "pink": 325}
"""Degrees of the hue circle that each word stands for."""

UP_TO = (19, 36, 62, 165, 255, 300, 345)
"""Where each word ends, in degrees; after the last one comes the first again."""

COLOURED = 0.2
"""Saturation from which a pixel has a colour at all."""

COLOURFUL = 0.35
"""Share of coloured pixels from which a picture has a colour, or can be given one."""

DOMINANT = 0.6
DARKEST = 0.45
PALEST = 0.55
WHITE = 0.06


def colour_of(picture: Image.Image) -> str | None:
    """The word for the colour that most of a picture's coloured pixels have.

    picture: RGBA, or RGB on white. None where no colour dominates, or too little has any.
    """
    hue, saturation, _, opaque = _planes(picture)
    coloured = opaque & (saturation >= COLOURED)
    if not coloured.any() or coloured.sum() < COLOURFUL * opaque.sum():
        return None
    words = np.searchsorted(UP_TO, hue[coloured]) % len(HUES)
    shares = np.bincount(words, weights=saturation[coloured], minlength=len(HUES))
    best = int(shares.argmax())
    return list(HUES)[best] if shares[best] >= DOMINANT * shares.sum() else None


def is_colourful(picture: Image.Image) -> bool:
    """Whether enough of a picture has a colour for another one to show."""
    _, saturation, _, opaque = _planes(picture)
    return bool((opaque & (saturation >= COLOURED)).sum() >= COLOURFUL * max(1, opaque.sum()))


def recoloured(picture: Image.Image, colour: str) -> Image.Image:
    """An RGBA picture with every coloured pixel in another colour; its lights and shades stay apart."""
    _, saturation, value, _ = _planes(picture)
    chosen = saturation >= COLOURED
    hues = np.full(chosen.shape, round(HUES[colour] / 360 * 255), np.uint8)
    strength = np.where(chosen, np.maximum(saturation, PALEST), saturation)
    light = np.where(chosen, DARKEST + (1 - DARKEST) * value, value)
    planes = [hues, *(np.round(plane * 255).astype(np.uint8) for plane in (strength, light))]
    changed = Image.merge("HSV", [Image.fromarray(plane) for plane in planes]).convert("RGB")
    changed.putalpha(picture.getchannel("A"))
    return changed


Plane = NDArray[np.float64]


def _planes(picture: Image.Image) -> tuple[Plane, Plane, Plane, NDArray[np.bool_]]:
    """Hue in degrees, saturation and value in 0 … 1, and which pixels are drawn on; each (H, W)."""
    hue, saturation, value = np.asarray(picture.convert("RGB").convert("HSV"), np.float64).transpose(2, 0, 1) / 255
    if picture.mode == "RGB":
        return hue * 360, saturation, value, (saturation > WHITE) | (value < 1 - WHITE)
    return hue * 360, saturation, value, np.asarray(picture.getchannel("A")) >= 128
