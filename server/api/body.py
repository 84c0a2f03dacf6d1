"""Reading a request: a JSON body of the right type and not too large, and the address it was sent to."""

from __future__ import annotations

from typing import Any

from starlette.requests import ClientDisconnect, Request

from server.errors import ApiError
from server.images import MAX_IMAGE_BYTES
from server.settings import Settings
from server.strict_json import parse_object

IMAGES_BODY_BYTES = 3 * MAX_IMAGE_BYTES
"""Limit of a body that images come in: an image and a mask of the largest size as base64, and the rest."""


async def read_object(request: Request, settings: Settings, *, limit_bytes: int | None = None) -> dict[str, Any]:
    """The JSON object a client sent. limit_bytes: where images come in it; else the setting's.

    Raises: ApiError 400, 413 or 415.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = "The body must be JSON: send it with the header Content-Type: application/json."
        raise ApiError(415, "unsupported_media_type", message)
    try:
        return parse_object(await _read(request, limit_bytes or settings.max_body_bytes))
    except ClientDisconnect:
        raise client_gone() from None


def base_url(request: Request) -> str:
    """Of this API as its client reached it, without a slash at the end."""
    return str(request.base_url).rstrip("/")


def client_gone() -> ApiError:
    """For the log and the metrics: nobody is left to read it."""
    return ApiError(499, "client_disconnected", "The client went away.")


async def _read(request: Request, limit_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise _too_large(limit_bytes)
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit_bytes:
            raise _too_large(limit_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large(limit_bytes: int) -> ApiError:
    return ApiError(413, "payload_too_large", f"The body must be at most {limit_bytes} bytes.")
