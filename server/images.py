"""Callers' images: what is accepted at all, limits before anything is decoded, and one fixed conversion to RGB.

Conversion: EXIF rotation applied; an ICC profile converted to sRGB, one that cannot be is ignored; 16-bit scaled
to 8; grey, palette and CMYK to RGB; transparency flattened on white. Metadata and trailing bytes do not survive.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import struct
import zlib
from contextlib import suppress
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from server.errors import ApiError, InvalidRequestError

MAX_IMAGE_BYTES = 8 * 1024 * 1024
MAX_PIXELS = 4096 * 4096
MIN_SIDE_PX = 8
MAX_ASPECT = 16
_MAX_PROFILE_BYTES = 1024 * 1024
_FORMATS = ("PNG", "JPEG", "WEBP")
_OTHER_FORMATS = (
    *(b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"8BPS", b"%!PS", b"%PDF", b"\0\0\1\0", b"\0\0\2\0"),
    *(b"\xc5\xd0\xd3\xc6", b"<svg", b"<?xml", b"\0\0\0\x0cjP", b"\xff\x4f\xff\x51", b"\xff\x0a", b"\0\0\0\x0cJXL"),
)
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_SIGNATURE = b"\xff\xd8\xff"
_CHUNK = struct.Struct(">I4s")
_SEGMENT = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
"""Begins each part of a JPEG; entropy-coded data holds none."""
_SCAN, _END_OF_IMAGE = b"\xff\xda", b"\xff\xd9"
MAX_SCANS = 100
"""Of a JPEG, whose decoder goes over all pixels at each; real ones have some ten."""
MAX_SEGMENTS = 2000
"""Parts of a JPEG, scans and tables among them; real ones have hundreds at most."""
_MISREAD_KEYS = (b"\x02\0", b"\x04\0", b"\x10\x02")
"""Depth and colour type of PNGs whose transparent colour Pillow compares with levels of another depth."""
_SRGB = ImageCms.createProfile("sRGB")
_WHITE = (255, 255, 255)
_SIXTEEN_TO_EIGHT = [(level + 128) // 257 for level in range(65536)]
"""By level; Pillow takes those outside as the nearest."""
_DATA_URL = re.compile(r"data:[^,]{0,128};base64,", re.IGNORECASE)

Image.MAX_IMAGE_PIXELS = None  # ``_check_size`` is the limit, with an answer of its own


def decode_file(text: str, param: str) -> bytes:
    """A file that came as base64, in lines or not, or a data URL.

    Raises: InvalidRequestError; nothing is ever fetched.
    """
    url = _DATA_URL.match(text)
    try:
        encoded = text[url.end() if url else 0 :].encode("ascii")
        return base64.b64decode(b"".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError):
        message = f"{param} must be base64 or a data URL of a PNG, JPEG or WebP file; addresses are not fetched."
        raise InvalidRequestError("invalid_image", message, param=param) from None


def open_image(data: bytes, param: str) -> Image.Image:
    """A decoded PNG, JPEG or WebP in its own mode, turned as its EXIF says. param: the field, for errors.

    Raises: ApiError 413 image_too_large (bytes or pixels, before decoding), 415 unsupported_image_type;
    InvalidRequestError invalid_image (also when animated) or out_of_range (its sides).
    """
    if len(data) > MAX_IMAGE_BYTES:
        raise image_too_large(param)
    _check_type(data, param)
    if data.startswith(_PNG_SIGNATURE):
        _check_png(data, param)
    elif data.startswith(_JPEG_SIGNATURE):
        _check_jpeg(data, param)
    else:
        _check_size(*_webp_size(data), param)  # its decoder takes memory for the pixels already when opened
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        _check_size(*image.size, param)
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
            message = f"{param} is animated; send one still image."
            raise InvalidRequestError("invalid_image", message, param=param)
        image.load()
    except ApiError:
        raise
    except Exception:  # decoders raise whatever they like on damaged files
        _invalid(param)
    return _turned(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit sRGB by the fixed conversion above."""
    alpha = alpha_of(image)
    rgb = _to_srgb(_eight_bit(image))
    if alpha is None:
        return rgb
    flat = Image.new("RGB", rgb.size, _WHITE)
    flat.paste(rgb, mask=alpha)
    return flat


def to_grey(image: Image.Image) -> Image.Image:
    """8-bit grey without its transparency: a mask's own levels, which no profile changes."""
    plain = _eight_bit(image)
    return plain if plain.mode == "L" else plain.convert("RGB").convert("L")


def alpha_of(image: Image.Image) -> Image.Image | None:
    """The 8-bit transparency, or None where the file has none."""
    if not image.has_transparency_data:
        return None
    if image.mode == "I;16":  # Pillow would compare the transparent level with 8 bits
        return Image.fromarray((np.asarray(image) != image.info["transparency"]) * np.uint8(255))
    return image.convert("RGBA").getchannel("A")


def write_png(image: Image.Image) -> bytes:
    """A canonical PNG: pixels and nothing else."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def read_image(png: bytes) -> NDArray[np.uint8]:
    """(H, W, 3) of a PNG that ``write_png`` made."""
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        return np.asarray(image.convert("RGB"))


def read_mask(png: bytes) -> NDArray[np.bool_]:
    """(H, W) of a mask PNG that ``write_png`` made: True where the image is generated."""
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        return np.asarray(image.convert("L")) >= 128


def image_too_large(param: str) -> ApiError:
    """For a file over the limit, noticed while it arrives or after."""
    message = f"{param} must be at most {MAX_IMAGE_BYTES} bytes."
    return ApiError(413, "image_too_large", message, param=param)


def _check_type(data: bytes, param: str) -> None:
    webp = data.startswith(b"RIFF") and data[8:12] == b"WEBP"
    if data.startswith((_PNG_SIGNATURE, _JPEG_SIGNATURE)) or webp:
        return
    start = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n")
    if data.startswith(_OTHER_FORMATS) or start.startswith(_OTHER_FORMATS) or data[4:8] == b"ftyp":
        message = f"{param} must be a PNG, JPEG or WebP file, whatever its name."
        raise ApiError(415, "unsupported_image_type", message, param=param)
    _invalid(param)


def _check_png(data: bytes, param: str) -> None:
    """Every chunk's length and CRC up to IEND; Pillow leaves those of the pixels unchecked."""
    at, kind = len(_PNG_SIGNATURE), b""
    view = memoryview(data)
    while kind != b"IEND":
        if at + _CHUNK.size + 4 > len(data):
            _invalid(param)
        length, kind = _CHUNK.unpack_from(data, at)
        end = at + _CHUNK.size + length
        if end + 4 > len(data) or zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            _invalid(param)
        if kind == b"acTL":
            message = f"{param} is animated; send one still image."
            raise InvalidRequestError("invalid_image", message, param=param)
        if kind == b"tRNS" and data[24:26] in _MISREAD_KEYS:
            message = (
                f"{param} has a transparent colour of {data[24]} bits; save it with an alpha channel or 8 bits."
            )
            raise InvalidRequestError("invalid_image", message, param=param)
        at = end + 4


def _check_jpeg(data: bytes, param: str) -> None:
    """Scans and parts up to the end of the image: what lies inside a part, such as a thumbnail, is none of them."""
    at, scans = 2, 0
    for _ in range(MAX_SEGMENTS):
        found = _SEGMENT.search(data, at)
        if found is None or found[0] == _END_OF_IMAGE:
            return
        scans += found[0] == _SCAN
        if scans > MAX_SCANS:
            break
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    message = (
        f"{param} is a JPEG of over {MAX_SCANS} scans or {MAX_SEGMENTS:,} parts; save it again as a plain one."
    )
    raise InvalidRequestError("invalid_image", message, param=param)


def _webp_size(data: bytes) -> tuple[int, int]:
    """(width, height) from a WebP header, (0, 0) where there is none. Source: RFC 9649."""
    kind, head = data[12:16], data[20:30].ljust(10, b"\0")
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = (int.from_bytes(head[k : k + 2], "little") & 0x3FFF for k in (6, 8))
    return width, height


def _check_size(width: int, height: int, param: str) -> None:
    if width * height > MAX_PIXELS:
        message = f"{param} must have at most {MAX_PIXELS} pixels."
        raise ApiError(413, "image_too_large", message, param=param)
    short, long = sorted((width, height))
    if short < MIN_SIDE_PX or long > MAX_ASPECT * short:
        message = f"{param} must be at least {MIN_SIDE_PX} pixels wide and high, and no longer than {MAX_ASPECT}:1."
        raise InvalidRequestError("out_of_range", message, param=param)


def _turned(image: Image.Image) -> Image.Image:
    with suppress(Exception):  # damaged EXIF is no reason to refuse the pixels
        return ImageOps.exif_transpose(image)
    return image


def _eight_bit(image: Image.Image) -> Image.Image:
    """Without transparency, in L, RGB or CMYK."""
    if image.mode.startswith("I"):
        return image.convert("I").point(_SIXTEEN_TO_EIGHT, "L")
    if image.mode in {"1", "L", "LA", "La"}:
        return image.convert("L")
    if image.mode == "P" and image.has_transparency_data:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns
    return image if image.mode == "CMYK" else image.convert("RGB")


def _to_srgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if isinstance(profile, bytes) and 0 < len(profile) <= _MAX_PROFILE_BYTES:
        with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, _SRGB, outputMode="RGB")
            if converted is not None:
                return converted
    return image.convert("RGB")


def _invalid(param: str) -> NoReturn:
    message = f"{param} is not a readable PNG, JPEG or WebP file."
    raise InvalidRequestError("invalid_image", message, param=param)
