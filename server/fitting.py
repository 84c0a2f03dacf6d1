"""A caller's image and mask brought to a trained size, as the canonical PNGs a request carries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageChops, ImageOps

from engines.manifest import Size
from server.errors import InvalidRequestError
from server.images import alpha_of, open_image, to_grey, to_rgb, write_png

EDIT_LEVEL = 128
"""A mask's pixel is generated from this level on; below it is kept."""

MaskRule = Callable[[Image.Image], Image.Image]
"""A decoded mask file → L, high where the image is generated."""

Fit = Literal["crop", "stretch"]


@dataclass(frozen=True)
class Fitted:
    """Canonical PNGs: image RGB, mask L with 255 = edit and 0 = keep, both of ``size``."""

    image: bytes
    mask: bytes | None
    size: Size


def fit_image(
    image: bytes,
    mask: bytes | None,
    rule: MaskRule,
    choose: Callable[[int, int], Size],
    *,
    fit: Fit = "crop",
    invert: bool = False,
) -> Fitted:
    """Decode, convert and fit. choose: (width, height) of the turned image → the trained size to bring it to.

    fit: cut the longer side to the size's aspect, about the centre, or stretch. invert: swap edit and keep.
    Raises: ApiError as ``open_image``; InvalidRequestError mask_size_mismatch, empty_mask, opaque_mask.
    """
    opened = open_image(image, "image")
    size = choose(*opened.size)
    target = (size.width, size.height)
    drawn = _fitted(to_rgb(opened), target, Image.Resampling.LANCZOS, fit)
    if mask is None:
        return Fitted(write_png(drawn), None, size)
    held = open_image(mask, "mask")
    if held.size != opened.size:
        message = f"mask must be as large as the image, {opened.size[0]}x{opened.size[1]} pixels."
        raise InvalidRequestError("mask_size_mismatch", message, param="mask")
    wanted = ImageChops.invert(rule(held)) if invert else rule(held)
    area = _thresholded(_fitted(_thresholded(wanted), target, Image.Resampling.BOX, fit))
    if not area.getbbox():
        message = (
            "mask has nothing to edit, at least after the crop to the size: the part to draw anew is alpha 0 in "
            "POST /v1/images/edits, white in POST /v1/jobs and img2img."
        )
        raise InvalidRequestError("empty_mask", message, param="mask")
    return Fitted(write_png(drawn), write_png(area), size)


def alpha_is_edit(mask: Image.Image) -> Image.Image:
    """OpenAI's rule: alpha 0 is edited. Raises: InvalidRequestError opaque_mask."""
    alpha = alpha_of(mask)
    if alpha is None:
        message = (
            "mask has no transparency: make the part to edit transparent (alpha 0). A black and white mask is "
            "for POST /v1/jobs, where white is edited."
        )
        raise InvalidRequestError("opaque_mask", message, param="mask")
    return ImageChops.invert(alpha)


def white_is_edit(mask: Image.Image) -> Image.Image:
    """The native rule: white is edited, and so is what is transparent."""
    grey, alpha = to_grey(mask), alpha_of(mask)
    return grey if alpha is None else ImageChops.lighter(grey, ImageChops.invert(alpha))


def white_or_opaque_is_edit(mask: Image.Image) -> Image.Image:
    """AUTOMATIC1111's rule: white is edited; in a mask with transparency, what is opaque is."""
    alpha = alpha_of(mask)
    return to_grey(mask) if alpha is None or alpha.getextrema() == (255, 255) else alpha


def nearest_size(sizes: tuple[Size, ...], width: int, height: int) -> Size:
    """The size of nearest aspect; of several, the one of nearest area."""
    return min(
        sizes,
        key=lambda s: (
            _ratio(s.width * height, s.height * width),
            _ratio(s.width * s.height, width * height),
        ),
    )


def _ratio(a: int, b: int) -> float:
    return max(a / b, b / a)


def _fitted(image: Image.Image, size: tuple[int, int], method: Image.Resampling, fit: Fit) -> Image.Image:
    if image.size == size:
        return image
    return ImageOps.fit(image, size, method) if fit == "crop" else image.resize(size, method)


def _thresholded(mask: Image.Image) -> Image.Image:
    return mask.point(lambda level: 255 if level >= EDIT_LEVEL else 0)
