"""The documents as their tests read them, and the commands that they may name."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import typer

from distill_jobs.cli import app as distill_app
from engines.cli import app as engines_app
from server.cli import app as server_app

ROOT = Path(__file__).parents[3]
PAGES = [
    *[ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))],
    *sorted((ROOT / "distill_jobs/weights").glob("*/README.md")),
]
CARDS = sorted((ROOT / "distill_jobs/recipes").glob("*.card.md"))
"""Beginnings of pages that ``card`` writes to ``docs``, from where their links lead."""
PAST = [ROOT / "CHANGELOG.md", ROOT / "distill_jobs/LOG.md"]
"""What was: its links lead somewhere, its commands need not exist any more."""
APPS = {"server": server_app, "engines": engines_app, "distill_jobs": distill_app}


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def table_rows(text: str) -> list[list[str]]:
    """Cells of every table line, backticks and blanks stripped."""
    lines = (line for line in text.splitlines() if line.startswith("|"))
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


@cache
def click_commands(module: str) -> dict[str, Any]:
    return dict(typer.main.get_command(APPS[module]).commands)  # type: ignore[attr-defined]


def options(command: Any) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
