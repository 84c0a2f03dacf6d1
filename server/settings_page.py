"""The reference of all settings, made from ``Settings`` and the flags of the commands: docs/configuration.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic import SecretStr

from server.settings import DEFAULT_BUNDLE, DEFAULT_NAME, Settings

SECTIONS = {
    "bundles": "Models and engines",
    "host": "Addresses and clients",
    "max_queue_s": "How much is let in",
    "redis": "Jobs and their results",
    "drain_timeout_s": "Process",
}
"""By the first setting of each."""

_HEAD = """# Configuration

Made by `make docs` from the class `Settings` in `server/settings.py`; `python -m server settings` prints it.

A command-line flag wins over the environment, the environment over the default. Settings without a flag are set
through the environment only. Lists stand there as words with commas between them. A wrong value ends the
process with one sentence that names it; a variable that begins with `HALFSTEP_` and is no setting is told in the
log, as `settings_unknown`.
"""

_UNITS = {"_s": "seconds", "_bytes": "bytes"}


def settings_page(app: typer.Typer) -> str:
    """The Markdown of the page. app: whose commands have the flags."""
    flags = _flags(app)
    lines = [_HEAD]
    for name, schema in Settings.model_json_schema()["properties"].items():
        if name in SECTIONS:
            lines += [f"## {SECTIONS[name]}\n", "| setting | environment | flag | value | default | meaning |"]
            lines += ["|---|---|---|---|---|---|"]
        cells = (f"`{name}`", f"`HALFSTEP_{name.upper()}`", flags.get(name, ""), _value(name, schema))
        lines += [f"| {' | '.join(cells)} | {_default(name)} | {_meaning(name)} |"]
        lines += [""] if _ends_section(name) else []
    return "\n".join(lines).rstrip() + "\n"


def _ends_section(name: str) -> bool:
    names = list(Settings.model_fields)
    after = names[names.index(name) + 1 :]
    return bool(after) and after[0] in SECTIONS


def _flags(app: typer.Typer) -> dict[str, str]:
    """By setting, its flag and the commands that have it."""
    found: dict[str, tuple[str, list[str]]] = {}
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for command, parameters in ((name, command.params) for name, command in commands.items()):
        for parameter in parameters:
            named = re.search(r"\(env HALFSTEP_(\w+)\)", getattr(parameter, "help", None) or "")
            if named is not None:
                found.setdefault(named[1].lower(), (parameter.opts[0], []))[1].append(command)
    return {name: f"`{flag}` of {', '.join(users)}" for name, (flag, users) in found.items()}


def _value(name: str, schema: dict[str, Any]) -> str:
    """What may be given, in words."""
    kind = next((each for each in schema.get("anyOf", [schema]) if each.get("type") != "null"), schema)
    if "enum" in kind:
        return ", ".join(f"`{word}`" for word in kind["enum"])
    if kind["type"] == "boolean":
        return "`true`, `false`"
    if kind["type"] == "array":
        return "folders" if kind["items"].get("format") == "path" else "list"
    if kind["type"] == "string":
        return "path" if kind.get("format") == "path" else "text"
    counted = next((unit for suffix, unit in _UNITS.items() if name.endswith(suffix)), kind["type"])
    return ", ".join([counted, *_limits(kind)])


def _limits(kind: dict[str, Any]) -> Iterator[str]:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    yield from (f"{sign} {kind[limit]:g}" for limit, sign in signs.items() if limit in kind)


def _default(name: str) -> str:
    default = Settings.model_fields[name].default
    if default == (DEFAULT_BUNDLE,):
        return f"`{DEFAULT_NAME}`"
    if isinstance(default, SecretStr):
        default = default.get_secret_value()
    if default is None:
        return "none"
    if default in ("", ()):
        return "empty"
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    text = default.as_posix() if isinstance(default, Path) else str(default)
    return f"`{text.lower() if isinstance(default, bool) else text}`"


def _meaning(name: str) -> str:
    description = Settings.model_fields[name].description or ""
    return description[0].upper() + description[1:].removesuffix(".")
