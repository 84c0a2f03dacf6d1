"""The sizes of image that a bundle draws in: as users write them, and as its graphs are declared and traced."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill_jobs.errors import RecipeError
from engines.manifest import FREE, MAX_SIZES, Size

Shape = tuple[int, int, int]
"""(C, h, w) of a latent."""


@dataclass(frozen=True)
class BundleSizes:
    """sizes: the first is the default; channels: of a latent; halved: times that the networks halve a latent."""

    sizes: tuple[Size, ...]
    channels: int
    halved: int = 0

    @property
    def axes(self) -> tuple[int, int]:
        """Height and width of latents as graphs declare them: free where there are several."""
        [first, *others] = self.sizes
        return (FREE, FREE) if others else (first.latent_height, first.latent_width)

    @property
    def traced(self) -> Shape | None:
        """What graphs of several sizes are traced with: small, and no two lengths alike. None of one size."""
        if len(self.sizes) == 1:
            return None
        return self.channels, 3 << self.halved, 5 << self.halved

    def shape(self, size: Size) -> Shape:
        return self.channels, size.latent_height, size.latent_width


def halvings(unet: Mapping[str, Any]) -> int:
    """Times that a UNet of this config halves what it is given; diffusers' own default has four levels."""
    return len(unet.get("block_out_channels", range(4))) - 1


def sizes_of(texts: Sequence[str], trained: Shape, scale: int, halved: int) -> BundleSizes:
    """texts: as ``512x768``; none for the trained size alone. scale: pixels a position of a latent.

    Raises: RecipeError naming a size that the networks cannot be given.
    """
    channels, height, width = trained
    if not texts:
        return BundleSizes((_size(width * scale, height * scale, scale),), channels, halved)
    step = scale << halved
    sizes = []
    for text in texts:
        matched = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
        if matched is None:
            raise RecipeError(f"--sizes: {text!r} is no size such as 512x768, width first, in pixels")
        wide, high = int(matched[1]), int(matched[2])
        if wide % step or high % step:
            raise RecipeError(f"--sizes: {text} does not fit these networks; use multiples of {step} pixels")
        sizes.append(_size(wide, high, scale))
    if len(set(sizes)) != len(sizes) or len(sizes) > MAX_SIZES:
        raise RecipeError(f"--sizes must name at most {MAX_SIZES} sizes, each once")
    return BundleSizes(tuple(sizes), channels, halved)


def _size(width: int, height: int, scale: int) -> Size:
    return Size(width=width, height=height, latent_width=width // scale, latent_height=height // scale)
