"""Every benchmark, one after the other, into docs/benchmarks.md: some minutes on a machine that does nothing else.

Run: python -m tests.benchmarks [--out FILE] [--digits BUNDLE] [--tiny]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tests.benchmarks.page import page
from tests.benchmarks.results import Overhead, Throughput

ROOT = Path(__file__).parents[2]
RANDOM = Path("runs/benchmarks/random")
DIGITS = Path("server/bundles/default")
RANDOM_ROUNDS, DIGITS_ROUNDS = 5, 5

_err = Console(stderr=True)


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


def main(
    out: Annotated[Path, typer.Option(help="The file to write.")] = ROOT / "docs" / "benchmarks.md",
    digits: Annotated[Path, typer.Option(help="Bundle whose HTTP overhead is measured too.")] = DIGITS,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Toy sizes, to try the harness: the figures mean nothing.")
    ] = False,
) -> None:
    """Run every benchmark and write the page."""
    small = ["--tiny"] if tiny else []
    rounds = ["--rounds", "1"] if tiny else ["--rounds", str(RANDOM_ROUNDS)]
    throughput = Throughput.model_validate_json(
        run("throughput", *(["--batches", "1,2", "--rounds", "1", *small] if tiny else []))
    )
    run("random_bundle", str(RANDOM), *small)
    random = Overhead.model_validate_json(run("http_overhead", str(RANDOM), *rounds))
    embedded = None
    if (ROOT / digits).is_dir():
        answer = run("http_overhead", str(digits), "--rounds", "1" if tiny else str(DIGITS_ROUNDS))
        embedded = Overhead.model_validate_json(answer)
    command = f"python -m tests.benchmarks.random_bundle {RANDOM} && {random.provenance.command}"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(throughput, random, command, embedded, str(digits)), encoding="utf-8")
    typer.echo(f"written: {out}")


if __name__ == "__main__":
    typer.run(main)
