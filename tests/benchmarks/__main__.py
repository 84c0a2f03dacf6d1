"""The benchmarks, one after the other, into docs/benchmarks.md: some minutes on a machine that does nothing else.

What each found is kept in runs/benchmarks, so that ``--only`` measures one part again and writes the whole page.
Run: python -m tests.benchmarks [--only goodput]… [--out FILE] [--digits BUNDLE] [--tiny]
"""

from __future__ import annotations

import json
import subprocess
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tests.benchmarks.page import page
from tests.benchmarks.page_parts import RANDOM, SHARED
from tests.benchmarks.results import Results

ROOT = Path(__file__).parents[2]
DIGITS = Path("server/bundles/digits")
ROUNDS = 5

_err = Console(stderr=True)


class Part(StrEnum):
    """What can be measured; each names a field of ``Results``."""

    THROUGHPUT = "throughput"
    STREAMS = "streams"
    RANDOM = "random"
    DIGITS = "digits"
    GOODPUT = "goodput"
    GOODPUT_SEPARATE = "goodput_separate"


DEFAULT = (Part.THROUGHPUT, Part.STREAMS, Part.RANDOM, Part.DIGITS, Part.GOODPUT)
"""Some 40 minutes, 29 of them goodput; the last part of all adds as many."""


def run(module: str, *arguments: str) -> str:
    """Run a benchmark as its own process, its output shown; the last line of it. Exits where it fails."""
    command = [sys.executable, "-m", f"tests.benchmarks.{module}", *arguments]
    _err.print(f"$ python -m {' '.join(command[2:])}", style="bold", highlight=False, soft_wrap=True)
    last = ""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = line.strip() or last
            typer.echo(line, nl=False)
    if process.returncode:
        _err.print(
            f"error: {module} failed with exit status {process.returncode}; its message is above", style="red"
        )
        raise typer.Exit(1)
    return last


def measure(part: Part, digits: Path, *, tiny: bool) -> dict[str, Any]:
    """The last line of a part's benchmark."""
    small, rounds = ["--tiny"] if tiny else [], ["--rounds", "1" if tiny else str(ROUNDS)]
    once = ["--rounds", "1", "--seconds", "1"] if tiny else []
    if part is Part.THROUGHPUT:
        last = run("throughput", *(["--batches", "1,2", "--rounds", "1", *small] if tiny else []))
    elif part is Part.STREAMS:
        last = run("streams", *(["--batches", "2", "--rounds", "1", *small] if tiny else []))
    elif part is Part.DIGITS:
        last = run("http_overhead", str(digits), *rounds)
    elif part is Part.GOODPUT:
        run("random_bundle", SHARED, "--shared", *small)
        last = run("goodput", SHARED, *once)
    else:
        run("random_bundle", RANDOM, *small)
        last = run("http_overhead", RANDOM, *rounds) if part is Part.RANDOM else run("goodput", RANDOM, *once)
    found: dict[str, Any] = json.loads(last)
    return found


def main(
    only: Annotated[list[Part] | None, typer.Option(help="Parts to measure; the others stay as kept.")] = None,
    out: Annotated[Path, typer.Option(help="The file to write.")] = ROOT / "docs" / "benchmarks.md",
    digits: Annotated[Path, typer.Option(help="Bundle whose HTTP overhead is measured too.")] = DIGITS,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Toy sizes, to try the harness: the figures mean nothing.")
    ] = False,
) -> None:
    """Run the benchmarks and write the page."""
    kept = ROOT / "runs" / "benchmarks" / ("tiny.json" if tiny else "results.json")
    results = Results.model_validate_json(kept.read_bytes()) if kept.is_file() else Results()
    for part in only or DEFAULT:
        found = {**results.model_dump(), part.value: measure(part, digits, tiny=tiny)}
        results = Results.model_validate(found)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(results.model_dump_json(indent=1) + "\n", encoding="utf-8")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(results), encoding="utf-8")
    typer.echo(f"written: {out}")


if __name__ == "__main__":
    typer.run(main)
