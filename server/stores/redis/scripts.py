"""The store's transitions as Lua, which Redis runs as a whole."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import NoScriptError

from server.stores.redis.errors import translated

READ_ONLY = frozenset({"ends", "position"})
NEEDS_MEMORY = frozenset({"submit"})
"""Refused when Redis is out of memory; what ends accepted jobs is not."""

_FOLDER = files("server.stores.redis") / "scripts"


class Script:
    """One transition. A script is sent once a server start and then called by its digest."""

    def __init__(self, redis: Redis, name: str) -> None:
        flags = "no-writes" if name in READ_ONLY else "" if name in NEEDS_MEMORY else "allow-oom"
        library, body = ((_FOLDER / f"{part}.lua").read_text("utf-8") for part in ("lib", name))
        self._redis = redis
        self._text = f"#!lua{f' flags={flags}' if flags else ''}\n{library}\n{body}"
        self._digest = ""

    async def __call__(self, prefix: str, *args: str | int | float | bytes) -> Any:
        """Raises: StoreUnavailableError."""
        with translated():
            if self._digest:
                try:
                    return await self._redis.evalsha(self._digest, 1, prefix, *args)
                except NoScriptError:  # Redis started anew
                    pass
            self._digest = await self._redis.script_load(self._text)
            return await self._redis.evalsha(self._digest, 1, prefix, *args)


class Scripts:
    """All transitions, called as ``await scripts.run(name, …)``. ttl_ms, lease_ms: see lib.lua."""

    def __init__(self, redis: Redis, prefix: str, ttl_ms: int, lease_ms: int) -> None:
        self._shared = (ttl_ms, lease_ms)
        self._prefix = prefix
        names = (entry.name.removesuffix(".lua") for entry in _FOLDER.iterdir() if entry.name.endswith(".lua"))
        self._scripts = {name: Script(redis, name) for name in names if name != "lib"}

    async def run(self, name: str, *args: str | int | float | bytes) -> Any:
        """Raises: StoreUnavailableError."""
        return await self._scripts[name](self._prefix, *self._shared, *args)
