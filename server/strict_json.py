"""JSON bodies read strictly: what Python's parser would let through is refused by name.

Source: RFC 8259; duplicate keys and non-finite numbers are where parsers differ, so neither is accepted.
"""

from __future__ import annotations

import codecs
import json
import math
from typing import Any, NoReturn

from server.errors import InvalidRequestError

MALFORMED = frozenset({"invalid_json", "duplicate_key", "too_deep", "too_many_values", "invalid_encoding"})
"""Codes of what is no JSON for this server, and 400 in every API."""

MAX_NUMBER_CHARS = 64
MAX_VALUES = 10_000
"""Commas, and brackets that open, of a body, those in its texts included: more than a valid request can have, whose
prompts have a limit and whose files are base64, and few enough to be parsed on the event loop."""


def parse_object(body: bytes) -> dict[str, Any]:
    """The one JSON object in ``body``. Raises: InvalidRequestError with the code of the broken rule."""
    _check_values(body)
    text = _decode(body)
    try:
        value = _DECODER.decode(text)
    except RecursionError:
        raise _too_deep() from None
    except ValueError:
        raise InvalidRequestError("invalid_json", "The body is not valid JSON.") from None
    if not isinstance(value, dict):
        raise InvalidRequestError("invalid_type", 'The body must be a JSON object such as {"prompt": "seven"}.')
    return value


def _check_values(body: bytes) -> None:
    """Every value but the first follows a comma or opens an array or object, so counting bytes bounds them all."""
    if body.count(b",") > MAX_VALUES:
        message = f"The JSON body must have at most {MAX_VALUES} commas, those in texts included; send less in it."
        raise InvalidRequestError("too_many_values", message)
    if body.count(b"[") + body.count(b"{") > MAX_VALUES:
        raise _too_deep()


def _too_deep() -> InvalidRequestError:
    message = "The JSON body is nested too deeply; requests here are flat."
    return InvalidRequestError("too_deep", message)


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
