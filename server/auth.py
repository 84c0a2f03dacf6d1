"""API keys: a file that holds their hashes, and who a request comes from.

A key is ``hs_<id>_<secret>`` with 256 random bits of secret, so one SHA-256 keeps it: there is nothing to guess.
The file is read again when it changes; a running server needs no restart for a new or revoked key.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import tempfile
from collections.abc import Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

import limits
import structlog
from pydantic import AwareDatetime, Field, ValidationError, field_validator

from engines.errors import HalfstepError
from server.errors import ApiError
from server.jobs import DEFAULT_TENANT
from server.request import Frozen

_log = structlog.get_logger()
_KEY = re.compile(r"hs_([0-9a-f]{8})_[A-Za-z0-9_-]{43}")


class Scope(StrEnum):
    """generate: make and cancel; read: models, one's own jobs and images; metrics: ``/metrics``."""

    GENERATE = "generate"
    READ = "read"
    METRICS = "metrics"


class KeyFileError(HalfstepError):
    """The file of API keys cannot be used; the message says why."""


class ApiKey(Frozen):
    """A key at rest. rate: its requests that generate; quota: images of its tenant; both as in ``60/minute``."""

    id: str = Field(pattern=r"^[0-9a-f]{8}$")
    tenant: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: frozenset[Scope] = frozenset({Scope.GENERATE, Scope.READ})
    created: AwareDatetime
    expires: AwareDatetime | None = None
    rate: str | None = None
    quota: str | None = None

    @field_validator("rate", "quota")
    @classmethod
    def _is_a_rate(cls, value: str | None) -> str | None:
        return None if value is None else check_rate(value)

    @property
    def expired(self) -> bool:
        return self.expires is not None and self.expires <= datetime.now(UTC)


class KeyFile(Frozen):
    """All keys, as the JSON file holds them."""

    keys: tuple[ApiKey, ...] = ()

    @field_validator("keys")
    @classmethod
    def _ids_differ(cls, keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        if len({key.id for key in keys}) < len(keys):
            raise ValueError("two keys have the same id")
        return keys


class Caller(Frozen):
    """Whom a request comes from. key: its id, None where keys are off."""

    tenant: str = DEFAULT_TENANT
    scopes: frozenset[Scope] = frozenset(Scope)
    key: str | None = None
    rate: str | None = None
    quota: str | None = None


ANYONE = Caller()

current_caller: ContextVar[Caller] = ContextVar("current_caller", default=ANYONE)
"""Whom the request under way comes from, as the gate found."""


def check_rate(text: str) -> str:
    """Raises: ValueError when it is no rate such as ``60/minute``."""
    try:
        rates = limits.parse_many(text)
    except ValueError:
        rates = []
    if len(rates) != 1 or rates[0].amount < 1:
        raise ValueError("a rate is a number above 0 for a time, such as 60/minute or 1000/day")
    return text


def read_keys(path: Path) -> KeyFile:
    """Raises: KeyFileError."""
    try:
        return KeyFile.model_validate_json(path.read_bytes())
    except OSError as error:
        reason = error.strerror or "unknown reason"
        raise KeyFileError(f"The file of API keys {path} cannot be read ({reason}).") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "its JSON"
        raise KeyFileError(f"The file of API keys {path} is wrong at {where}: {first['msg']}.") from None


def write_keys(path: Path, keys: KeyFile) -> None:
    """Replace the file at once, readable by its owner alone. Raises: KeyFileError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(keys.model_dump_json(indent=2) + "\n")
        Path(name).replace(path)
    except OSError as error:
        reason = error.strerror or "unknown reason"
        raise KeyFileError(f"The file of API keys {path} cannot be written ({reason}).") from None


def new_key(
    tenant: str,
    scopes: Sequence[Scope],
    expires: datetime | None = None,
    rate: str | None = None,
    quota: str | None = None,
) -> tuple[str, ApiKey]:
    """The key itself, which is shown once, and what is kept of it. Raises: ValidationError."""
    key_id = secrets.token_hex(4)
    key = f"hs_{key_id}_{secrets.token_urlsafe(32)}"
    kept = ApiKey(
        id=key_id,
        tenant=tenant,
        sha256=_hash(key),
        scopes=frozenset(scopes),
        created=datetime.now(UTC).replace(microsecond=0),
        expires=expires,
        rate=rate,
        quota=quota,
    )
    return key, kept


class Keyring:
    """The keys of one file, followed as it changes. Raises: KeyFileError when it is unusable at the start."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._stamp()
        self._keys = {key.id: key for key in read_keys(path).keys}

    @property
    def tenants(self) -> frozenset[str]:
        """Those that can have work in the queue."""
        able = (key for key in self._current().values() if Scope.GENERATE in key.scopes and not key.expired)
        return frozenset(key.tenant for key in able)

    def caller(self, presented: str) -> Caller:
        """Raises: ApiError 401."""
        found = _KEY.fullmatch(presented)
        kept = self._current().get(found[1]) if found else None
        if kept is None or not hmac.compare_digest(_hash(presented), kept.sha256):
            raise ApiError(401, "invalid_api_key", "This API key is not valid here.")
        if kept.expired:
            raise ApiError(401, "expired_api_key", "This API key has expired.")
        quota = self._quota(kept.tenant)
        return Caller(tenant=kept.tenant, scopes=kept.scopes, key=kept.id, rate=kept.rate, quota=quota)

    def _quota(self, tenant: str) -> str | None:
        """A tenant has one, whatever key it uses: that of the newest of its keys that has any."""
        own = [key for key in self._current().values() if key.tenant == tenant and key.quota and not key.expired]
        return max(own, key=lambda key: key.created).quota if own else None

    def _current(self) -> dict[str, ApiKey]:
        stamp = self._stamp()
        if stamp != self._seen:
            self._seen = stamp
            try:
                self._keys = {key.id: key for key in read_keys(self._path).keys}
            except KeyFileError as error:
                _log.error("api_keys_unusable", error=str(error), kept=len(self._keys))
        return self._keys

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
