"""Who may ask for what: the ASGI layer that finds the caller of every request before any route sees it."""

from __future__ import annotations

import base64
import binascii
import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.a1111_errors import A1111_PATH
from server.api.guard import respond
from server.auth import ANYONE, Caller, Keyring, current_caller
from server.auth import Scope as KeyScope
from server.errors import ApiError, RateError, store_away
from server.metrics import Metrics
from server.rates import Rates
from server.stores.base import JobStore, StoreUnavailableError

_OPEN = re.compile(r"/|/livez|/readyz|/docs|/static/.*|/files/.*")
"""Probes, static pages, and files at addresses that are signed."""

_GENERATES = re.compile(r"/v1/images/(generations|edits)|/v1/jobs|/sdapi/v1/(txt2img|img2img)")


def is_open(path: str) -> bool:
    """Whether a path is served without an API key, and without asking the job store who calls."""
    return _OPEN.fullmatch(path) is not None


def generates(method: str, path: str) -> bool:
    """Whether a request asks for images, which a rate bounds. Cancelling never waits for one."""
    return method == "POST" and _GENERATES.fullmatch(path) is not None


class Gate:
    """keyring: None where keys are off and every caller is the same."""

    def __init__(
        self,
        app: ASGIApp,
        keyring: Keyring | None,
        rates: Rates,
        rate: str | None,
        store: JobStore,
        metrics: Metrics,
    ) -> None:
        self._app = app
        self._keyring = keyring
        self._rates = rates
        self._rate = rate
        self._store = store
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                current_caller.set(await self._admit(scope))
            except (ApiError, StoreUnavailableError) as cause:
                error = cause if isinstance(cause, ApiError) else store_away()
                if error.status == 401:
                    challenges = 'Basic realm="halfstep", Bearer' if _takes_basic(scope) else "Bearer"
                    error.headers["www-authenticate"] = challenges
                self._metrics.rejected.labels(error.code).inc()
                await respond(error, scope, send)
                return
        await self._app(scope, receive, send)

    async def _admit(self, scope: Scope) -> Caller:
        """Raises: ApiError 401, 403 or 429."""
        if is_open(scope["path"]):
            return ANYONE
        caller = ANYONE if self._keyring is None else self._keyring.caller(_presented(scope))
        needed = _needed(scope)
        if needed not in caller.scopes:
            raise ApiError(403, "insufficient_scope", f"This API key lacks the scope {needed}.")
        rate = (caller.rate or self._rate) if generates(scope["method"], scope["path"]) else None
        if rate is not None and not await self._repeats(scope, caller):
            wait_s = await self._rates.spend(rate, 1, "rate", caller.key or "")
            if wait_s is not None:
                message = "This API key is used too often; the Retry-After header says when to try again."
                raise RateError("rate_limited", message, retry_after_s=wait_s)
        return caller

    async def _repeats(self, scope: Scope, caller: Caller) -> bool:
        """Whether a job is submitted under a key that has one already: that generates nothing."""
        key = Headers(scope=scope).get("idempotency-key")
        if key is None or (scope["method"], scope["path"]) != ("POST", "/v1/jobs"):
            return False
        return await self._store.find_key(caller.tenant, key) is not None


def _needed(scope: Scope) -> KeyScope:
    if scope["path"] == "/metrics":
        return KeyScope.METRICS
    return KeyScope.READ if scope["method"] in ("GET", "HEAD", "OPTIONS") else KeyScope.GENERATE


def _takes_basic(scope: Scope) -> bool:
    """AUTOMATIC1111 clients send the key as the password of basic authentication."""
    return str(scope["path"]).startswith(A1111_PATH)


def _presented(scope: Scope) -> str:
    """The key a request carries. Raises: ApiError 401."""
    kind, _, value = Headers(scope=scope).get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic" and _takes_basic(scope):
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    also = ", or as the password of basic authentication" if _takes_basic(scope) else ""
    message = f"An API key is needed: send it as Authorization: Bearer KEY{also}."
    raise ApiError(401, "missing_api_key", message)
