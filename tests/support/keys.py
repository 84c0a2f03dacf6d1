"""A file of API keys for three tenants, and the keys themselves."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from server.auth import KeyFile, Scope, new_key, write_keys

PAST = datetime.now(UTC) - timedelta(seconds=1)

KINDS: dict[str, dict[str, Any]] = {
    "a": {"tenant": "a"},
    "b": {"tenant": "b"},
    "c": {"tenant": "c"},
    "reader": {"tenant": "a", "scopes": [Scope.READ]},
    "maker": {"tenant": "a", "scopes": [Scope.GENERATE]},
    "scraper": {"tenant": "ops", "scopes": [Scope.METRICS]},
    "expired": {"tenant": "a", "expires": PAST},
    "limited": {"tenant": "d", "rate": "3/hour"},
    "metered": {"tenant": "e", "quota": "5/day"},
}


def write_key_file(path: Path) -> dict[str, str]:
    """The keys by the names above."""
    made = {name: new_key(**{"scopes": [Scope.GENERATE, Scope.READ], **kind}) for name, kind in KINDS.items()}
    write_keys(path, KeyFile(keys=tuple(kept for _, kept in made.values())))
    return {name: key for name, (key, _) in made.items()}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}
