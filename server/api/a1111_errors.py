"""Errors of AUTOMATIC1111's paths, whichever layer refuses, in the shape that its clients read."""

from __future__ import annotations

from typing import Any

from server.errors import ApiError, renamed
from server.strict_json import MALFORMED

A1111_PATH = "/sdapi/"

_NAMES = {"image": "init_images", "strength": "denoising_strength", "model": "override_settings"}
"""Fields of those clients by the native name that the rest of the server has for them."""


class A1111Error(ApiError):
    """An error in the shape these clients read; a wrong field is 422, a body that is no JSON 400."""

    @classmethod
    def of(cls, error: ApiError) -> A1111Error:
        status = 422 if error.status == 400 and error.code not in MALFORMED else error.status
        param = _NAMES.get(error.param or "", error.param)
        message = renamed(error.message, error.param or "", param or "")
        return cls(status, error.code, message, param=param, headers=error.headers)

    def body(self) -> dict[str, Any]:
        return {"error": self.code, "detail": self.message, "body": "", "errors": self.param or ""}


def error_at(path: str, error: ApiError) -> ApiError:
    """The error as the clients of this path read it."""
    return A1111Error.of(error) if path.startswith(A1111_PATH) else error
