"""What can go wrong towards a client, and the OpenAI-shaped body that says so.

ApiError                     an answer with a status, a code and, where one field is at fault, its name
├── InvalidRequestError      400: the request asks for something malformed or not offered
├── NotFoundError            404
├── RateError                429: this caller's share is used up; come back in ``retry_after_s``
└── OverloadedError          503: come back in ``retry_after_s``

Messages never repeat what the client sent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from engines.errors import HalfstepError


class StartError(HalfstepError):
    """The process cannot start; the message says what to do."""


class ApiError(Exception):
    """Base of every refusal. param: the public field name, or None; code: stable and machine-readable.

    after_acceptance: set on the way out of an accepted request, which counts by how it ended, not as refused.
    """

    after_acceptance = False

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """OpenAI's error family."""
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def payload(self) -> bytes:
        return json.dumps(self.body(), ensure_ascii=False).encode()


class InvalidRequestError(ApiError):
    """400. Validation is 400 in the OpenAI-shaped API; the code tells which rule."""

    def __init__(self, code: str, message: str, *, param: str | None = None) -> None:
        super().__init__(400, code, message, param=param)


class NotFoundError(ApiError):
    """404."""

    def __init__(self, code: str, message: str, *, param: str | None = None) -> None:
        super().__init__(404, code, message, param=param)


class RateError(ApiError):
    """429 with both retry headers: whole seconds for browsers and proxies, milliseconds for SDKs."""

    def __init__(self, code: str, message: str, *, retry_after_s: float) -> None:
        super().__init__(429, code, message, headers=_retry_headers(retry_after_s))


class OverloadedError(ApiError):
    """503 with both retry headers."""

    def __init__(self, code: str, message: str, *, retry_after_s: float) -> None:
        super().__init__(503, code, message, headers=_retry_headers(retry_after_s))


def store_away() -> OverloadedError:
    """What a request gets while the job store does not answer."""
    message = "The job store does not answer; send the request again."
    return OverloadedError("store_unavailable", message, retry_after_s=1.0)


def unreadable_job() -> ApiError:
    """What a request about a job gets that another version wrote; another process may be of that version."""
    message = "This server runs another version than the one that wrote this job, and cannot read it; ask again."
    return ApiError(500, "unreadable_job", message)


def job_gone() -> ApiError:
    """What a request about a job gets that the store has forgotten."""
    return ApiError(410, "gone", "This job has ended and its time is over.")


def result_store_away() -> OverloadedError:
    """What a request gets while the result store does not answer."""
    message = "The result store does not answer; send the request again."
    return OverloadedError("result_store_unavailable", message, retry_after_s=1.0)


def not_worth_a_retry(status: int, code: str, message: str) -> ApiError:
    """Of a status that OpenAI's SDKs send again by themselves, where the answer would be the same."""
    return ApiError(status, code, message, headers={"x-should-retry": "false"})


def renamed(message: str, name: str, other: str) -> str:
    """The message under another name of the field that it may begin with."""
    return f"{other}{message.removeprefix(name)}" if message.startswith(f"{name} ") else message


def _retry_headers(retry_after_s: float) -> dict[str, str]:
    return {
        "retry-after": str(max(1, math.ceil(retry_after_s))),
        "retry-after-ms": str(max(1, math.ceil(retry_after_s * 1000))),
    }
