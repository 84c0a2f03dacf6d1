"""JSON bodies read strictly: what Python's parser would let through is refused by name.

Source: RFC 8259; duplicate keys and non-finite numbers are where parsers differ, so neither is accepted.
"""

from __future__ import annotations

import codecs
import json
import math
from typing import Any, NoReturn

from server.errors import InvalidRequestError

MAX_NUMBER_CHARS = 64


def parse_object(body: bytes) -> dict[str, Any]:
    """The one JSON object in ``body``. Raises: InvalidRequestError with the code of the broken rule."""
    text = _decode(body)
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise InvalidRequestError(
            "too_deep", "The JSON body is nested too deeply; requests here are flat."
        ) from None
    except ValueError:
        raise InvalidRequestError("invalid_json", "The body is not valid JSON.") from None
    if not isinstance(value, dict):
        raise InvalidRequestError("invalid_type", 'The body must be a JSON object such as {"prompt": "seven"}.')
    return value


def _decode(body: bytes) -> str:
    if body.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\x00" in body:
        raise InvalidRequestError("invalid_encoding", "The body must be UTF-8 without a byte-order mark.")
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidRequestError("invalid_encoding", "The body must be valid UTF-8.") from None


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise InvalidRequestError("duplicate_key", "The JSON body names the same key twice.")
    return result


def _constant(_: str) -> NoReturn:
    raise InvalidRequestError("invalid_json", "NaN and Infinity are not JSON numbers.")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise InvalidRequestError("invalid_json", "A number in the body is too large.")
    return value


def _int(text: str) -> int:
    if len(text) > MAX_NUMBER_CHARS:
        raise InvalidRequestError("invalid_json", "A number in the body has too many digits.")
    return int(text)


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_float, parse_int=_int)
