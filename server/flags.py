"""The command line's flags that stand for settings, and settings read with them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from server.errors import StartError
from server.settings import DEFAULT_NAME, Settings


def _first_sentence(description: str) -> str:
    """Without its full stop."""
    return description.partition(". ")[0].removesuffix(".")


def _option(field: str, *flags: str) -> Any:
    """A flag that overrides one setting; its help is the setting's."""
    info = Settings.model_fields[field]
    default = info.default
    if field == "bundles":
        default = DEFAULT_NAME
    if field == "rungs":
        default = ",".join(map(str, default))
    # In brackets the name would be markup.
    text = f"{_first_sentence(info.description or '')} (env HALFSTEP_{field.upper()})"
    return typer.Option(*flags, help=text, show_default=str(default))


Bundles = Annotated[list[Path] | None, _option("bundles", "--bundle")]
Host = Annotated[str | None, _option("host", "--host")]
Port = Annotated[int | None, _option("port", "--port")]
Backend = Annotated[str | None, _option("backend", "--backend")]
StartBackend = Annotated[str | None, _option("start_backend", "--start-backend")]
Precision = Annotated[str | None, _option("precision", "--precision")]
Threads = Annotated[int | None, _option("threads", "--threads")]
Rungs = Annotated[str | None, _option("rungs", "--rungs")]
CacheDir = Annotated[Path | None, _option("cache_dir", "--cache-dir")]
MaxQueue = Annotated[float | None, _option("max_queue_s", "--max-queue-s")]
DrainTimeout = Annotated[float | None, _option("drain_timeout_s", "--drain-timeout-s")]
LogLevel = Annotated[str | None, _option("log_level", "--log-level")]
ApiKeys = Annotated[Path | None, _option("api_keys", "--api-keys")]
RedisUrl = Annotated[str | None, _option("redis", "--redis")]
MetricsPort = Annotated[int | None, _option("metrics_port", "--metrics-port")]
Isolate = Annotated[bool | None, _option("isolate_engine", "--isolate-engine/--no-isolate-engine")]


def read_settings(**flags: Any) -> Settings:
    """Flags over the environment over the defaults; None is a flag that was not given.

    Raises: StartError, one sentence that names the setting.
    """
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:  # two settings that do not go together
            raise StartError(f"The settings are wrong: {message}.") from None
        name = str(first["loc"][0])
        raise StartError(f"The setting {name} (HALFSTEP_{name.upper()}) is wrong: {message}.") from None
