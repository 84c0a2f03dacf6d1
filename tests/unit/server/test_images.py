"""Callers' images: everything on the list of bad ones is refused by status and code, the rest converted one way."""

from __future__ import annotations

import io
import subprocess
import sys
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from engines.manifest import Size
from server import images
from server.errors import ApiError, InvalidRequestError
from server.fitting import alpha_is_edit, fit_image, nearest_size, white_is_edit, white_or_opaque_is_edit
from server.images import (
    MAX_IMAGE_BYTES,
    MAX_SCANS,
    MAX_SEGMENTS,
    alpha_of,
    decode_file,
    open_image,
    read_image,
    read_mask,
    to_rgb,
    write_png,
)
from tests.support.pictures import (
    SIZE,
    black_png,
    file_of,
    jpeg_of_scans,
    mask_file,
    photo,
    png_claiming,
    with_chunk,
)
from tests.support.serving import ROOT

AT = Size(width=64, height=64, latent_width=8, latent_height=8)
GOOD = file_of(photo())
JPEG = file_of(photo(), "JPEG")
BOMB = zlib.compress(bytes(80_000_000))


def flipped(png: bytes) -> bytes:
    """One bit of the pixels changed, the CRC left."""
    at = png.index(b"IDAT") + 20
    return png[:at] + bytes([png[at] ^ 1]) + png[at + 1 :]


def animated() -> bytes:
    return file_of(photo(), "WEBP", save_all=True, append_images=[photo(seed=1)])


BAD: list[tuple[str, Callable[[], bytes], int, str]] = [
    ("nothing", lambda: b"", 400, "invalid_image"),
    ("text", lambda: b"not an image at all", 400, "invalid_image"),
    ("a URL", lambda: b"http://example.com/cat.png", 400, "invalid_image"),
    ("truncated PNG", lambda: GOOD[: len(GOOD) // 2], 400, "invalid_image"),
    ("truncated JPEG", lambda: file_of(photo(), "JPEG")[:200], 400, "invalid_image"),
    ("bad CRC", lambda: flipped(GOOD), 400, "invalid_image"),
    ("GIF", lambda: file_of(photo(), "GIF"), 415, "unsupported_image_type"),
    ("BMP", lambda: file_of(photo(), "BMP"), 415, "unsupported_image_type"),
    ("TIFF", lambda: file_of(photo(), "TIFF"), 415, "unsupported_image_type"),
    ("ICO", lambda: file_of(photo(), "ICO"), 415, "unsupported_image_type"),
    ("EPS", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n", 415, "unsupported_image_type"),
    ("PSD", lambda: b"8BPS\0\1", 415, "unsupported_image_type"),
    ("SVG", lambda: b"<?xml version='1.0'?><svg/>", 415, "unsupported_image_type"),
    ("PDF", lambda: b"%PDF-1.7\n", 415, "unsupported_image_type"),
    ("144 megapixels", lambda: png_claiming(12_000, 12_000), 413, "image_too_large"),
    ("a line", lambda: png_claiming(20_000, 1), 400, "out_of_range"),
    ("a point", lambda: file_of(photo((1, 1))), 400, "out_of_range"),
    ("animated PNG", lambda: with_chunk(GOOD, b"acTL", bytes(8)), 400, "invalid_image"),
    ("animated WebP", animated, 400, "invalid_image"),
    ("too many bytes", lambda: GOOD + bytes(MAX_IMAGE_BYTES), 413, "image_too_large"),
    (
        "text bomb",
        lambda: with_chunk(GOOD, b"zTXt", b"k\0\0" + zlib.compress(bytes(80_000_000))),
        400,
        "invalid_image",
    ),
    ("scan bomb", lambda: jpeg_of_scans(MAX_SCANS + 1), 400, "invalid_image"),
    ("part bomb", lambda: JPEG[:2] + b"\xff\xfe\0\2" * MAX_SEGMENTS + JPEG[2:], 400, "invalid_image"),
]


@pytest.mark.parametrize(("make", "status", "code"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_bad_image_is_refused_by_name(make: Callable[[], bytes], status: int, code: str) -> None:
    with pytest.raises(ApiError) as refused:
        to_rgb(open_image(make(), "image"))
    assert (refused.value.status, refused.value.code, refused.value.param) == (status, code, "image")


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        *(("JPEG", mode) for mode in ("L", "RGB", "CMYK")),
        *(("WEBP", mode) for mode in ("RGB", "RGBA")),
    ],
)
def test_every_mode_is_converted(kind: str, mode: str) -> None:
    if mode == "I;16":
        grey = photo(mode="L")
        image, expected = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), grey.convert("RGB")
    else:
        image = photo(mode=mode)
        expected = image.convert("RGB")
    got = np.asarray(to_rgb(open_image(file_of(image, kind, quality=100, lossless=True), "image")))
    assert got.shape == (*SIZE, 3)
    assert np.abs(got.astype(int) - np.asarray(expected)).max() <= (12 if kind == "JPEG" else 1)


@pytest.mark.parametrize(("level", "expected"), [(0, 0), (128, 0), (129, 1), (385, 1), (386, 2), (65_535, 255)])
def test_levels_of_16_bits_go_to_the_nearest_of_8(level: int, expected: int) -> None:
    file = file_of(Image.fromarray(np.full(SIZE, level, np.uint16)))
    assert to_rgb(open_image(file, "image")).getextrema() == ((expected, expected),) * 3


def test_transparency_is_flattened_on_white() -> None:
    clear = Image.new("RGBA", SIZE, (10, 20, 30, 0))
    assert np.asarray(to_rgb(open_image(file_of(clear), "image"))).min() == 255


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("key", [1, 255, 40_000])
def test_the_transparent_level_of_16_bits_is_all_of_it(key: int) -> None:
    levels = np.full(SIZE, key, np.uint16)
    levels[:, 32:] = key + 1
    file = file_of(Image.fromarray(levels), transparency=key)
    assert (np.asarray(alpha_of(open_image(file, "image"))) == [0] * 32 + [255] * 32).all()
    seen = np.asarray(to_rgb(open_image(file, "image")))
    assert seen[:, :32].min() == 255
    assert seen[:, 32:].max() < 255
    assert (fitted_mask(file) == [True] * 32 + [False] * 32).all()


@pytest.mark.parametrize(
    ("depth", "colour", "channels", "refused"),
    [
        *((1, 0, 1, False), (2, 0, 1, True), (4, 0, 1, True), (8, 0, 1, False), (16, 0, 1, False)),
        *((8, 2, 3, False), (16, 2, 3, True)),
    ],
)
def test_a_transparent_colour_that_would_be_misread_is_refused(
    depth: int, colour: int, channels: int, refused: bool
) -> None:
    file = with_chunk(black_png(depth, colour), b"tRNS", bytes(2 * channels))
    if refused:
        with pytest.raises(InvalidRequestError, match=f"mask has a transparent colour of {depth} bits; save it"):
            open_image(file, "mask")
    else:
        assert np.asarray(alpha_of(open_image(file, "mask"))).max() == 0, "black is the colour"
    open_image(black_png(depth, colour), "mask")


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency_is_flattened_without_a_warning() -> None:
    palette = Image.new("P", SIZE, 1)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    seen = file_of(palette, transparency=b"\x00\xff")
    clear = file_of(palette, transparency=b"\x00\x00")
    assert to_rgb(open_image(seen, "image")).getpixel((0, 0)) == (200, 100, 50)
    assert to_rgb(open_image(clear, "image")).getpixel((0, 0)) == (255, 255, 255)


def test_scans_count_where_they_are_scans() -> None:
    """Not inside a thumbnail, nor behind the end, where telephones put a film."""
    thumbnail = b"\xff\xe1\x10\0" + b"\xff\xda" * 2047
    for jpeg in (jpeg_of_scans(MAX_SCANS), JPEG[:2] + thumbnail + JPEG[2:], JPEG + b"\xff\xda" * 1000):
        assert open_image(jpeg, "image").size == SIZE


def test_what_is_wrong_with_a_scan_bomb_is_said() -> None:
    with pytest.raises(InvalidRequestError, match="init_images is a JPEG of over 100 scans"):
        open_image(jpeg_of_scans(MAX_SCANS + 1), "init_images")


def test_sixteen_bits_take_less_than_256_mb() -> None:
    """In a process of its own, as the most it ever took is what is measured."""
    script = (
        "import resource, numpy as np; from PIL import Image; from server import images;"
        "image = Image.fromarray(np.zeros((4096, 4096), np.uint16));"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "before = peak(); images.to_grey(image); print((peak() - before) // 1024)"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(ended.stdout) < 128, "beside the file and the image themselves"


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("YWJj", b"abc"),
        ("YW\r\nJj\n", b"abc"),
        ("data:image/png;base64,YWJj", b"abc"),
        ("YWJj!", None),
        ("YW-Jj", None),
        ("YWJ", None),
        ("YWJ\xe4", None),
    ],
)
def test_base64_is_read_to_the_letter(text: str, data: bytes | None) -> None:
    with nullcontext() if data else pytest.raises(InvalidRequestError, match="image must be base64"):
        assert decode_file(text, "image") == data


def test_exif_turns_the_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter clockwise
    turned = open_image(file_of(photo((64, 32)), "JPEG", exif=exif), "image")
    assert turned.size == (32, 64)


def test_a_profile_is_applied_and_a_broken_one_ignored() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    same = to_rgb(open_image(file_of(photo(), icc_profile=lab), "image"))
    broken = to_rgb(open_image(file_of(photo(), icc_profile=b"no profile"), "image"))
    plain = np.asarray(photo()).astype(int)
    assert np.abs(np.asarray(same) - plain).max() <= 1
    assert (np.asarray(broken) == plain).all()


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: GOOD + bytes(MAX_IMAGE_BYTES - len(GOOD)), None),
        (lambda: file_of(photo((8, 128))), None),
        (lambda: file_of(photo((8, 129))), "out_of_range"),
        (lambda: file_of(photo((7, 64))), "out_of_range"),
        (lambda: png_claiming(4096, 4096), "invalid_image"),  # not too large, but cut short
        (lambda: png_claiming(4097, 4096), "image_too_large"),
    ],
    ids=["bytes", "sides", "too long", "too narrow", "pixels", "too many pixels"],
)
def test_a_limit_is_the_last_that_is_accepted(make: Callable[[], bytes], code: str | None) -> None:
    with nullcontext() if code is None else pytest.raises(ApiError) as refused:
        open_image(make(), "image")
    assert refused is None or refused.value.code == code


WEBPS: dict[str, dict[str, Any]] = {
    "lossy": {},
    "lossless": {"lossless": True},
    "extended": {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"},
}


@pytest.mark.parametrize("kind", WEBPS)
def test_a_webp_is_as_large_as_its_header_says_before_it_is_decoded(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = file_of(photo((64, 40)), "WEBP", **WEBPS[kind])
    assert open_image(file, "image").size == images._webp_size(file) == (64, 40)
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 40 - 1)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(ApiError) as refused:
        open_image(file, "image")
    assert refused.value.code == "image_too_large"


def test_what_trails_the_pixels_does_not_survive() -> None:
    clean = write_png(to_rgb(open_image(GOOD + b"<script>", "image")))
    assert b"script" not in clean
    assert (read_image(clean) == np.asarray(photo())).all()


def fitted_mask(mask: bytes, rule: Callable[[Image.Image], Image.Image] = alpha_is_edit) -> np.ndarray:
    fitted = fit_image(GOOD, mask, rule, lambda w, h: AT)
    assert fitted.mask is not None
    return read_mask(fitted.mask)


def test_the_transparent_part_is_edited() -> None:
    edited = fitted_mask(mask_file((16, 16, 40, 48)))
    assert edited[16:48, 16:40].all()
    assert edited.sum() == 32 * 24


def test_white_is_edited_in_the_other_conventions() -> None:
    grey = Image.new("L", SIZE, 0)
    grey.paste(255, (0, 0, 32, 64))
    for rule in (white_is_edit, white_or_opaque_is_edit):
        edited = fitted_mask(file_of(grey), rule)
        assert edited[:, :32].all()
        assert not edited[:, 32:].any()


@pytest.mark.parametrize(
    ("mask", "code"),
    [
        (mask_file(size=(32, 64)), "mask_size_mismatch"),
        (mask_file((0, 0, 0, 0)), "empty_mask"),
        (file_of(Image.new("L", SIZE, 255)), "opaque_mask"),
        (b"junk", "invalid_image"),
    ],
)
def test_a_bad_mask_is_refused_by_name(mask: bytes, code: str) -> None:
    with pytest.raises(ApiError) as refused:
        fitted_mask(mask)
    assert (refused.value.code, refused.value.param) == (code, "mask")


def test_a_mask_of_everything_is_accepted() -> None:
    assert fitted_mask(mask_file((0, 0, 64, 64))).all()


def test_a_soft_mask_is_edited_from_half_way() -> None:
    soft = Image.new("RGBA", SIZE, (0, 0, 0, 255))
    soft.paste((0, 0, 0, 127), (0, 0, 32, 64))
    soft.paste((0, 0, 0, 128), (32, 0, 64, 64))
    edited = fitted_mask(file_of(soft))
    assert edited[:, :32].all()
    assert not edited[:, 32:].any()


def test_an_image_is_cut_about_its_centre() -> None:
    wide = Image.new("RGB", (128, 64), "red")
    wide.paste("blue", (32, 0, 96, 64))
    cut = read_image(fit_image(file_of(wide), None, alpha_is_edit, lambda w, h: AT).image)
    assert (cut == (0, 0, 255)).all()


def test_the_nearest_aspect_is_chosen() -> None:
    sizes = (AT, AT.model_copy(update={"width": 96, "latent_width": 12}))
    assert nearest_size(sizes, 640, 480).width == 96
    assert nearest_size(sizes, 500, 480).width == 64
    twice = Size(width=128, height=128, latent_width=16, latent_height=16)
    assert [nearest_size((AT, twice), side, side).width for side in (80, 120)] == [64, 128], "then the nearest area"


def test_a_canonical_png_is_what_was_drawn() -> None:
    assert Image.open(io.BytesIO(write_png(photo()))).info == {}
