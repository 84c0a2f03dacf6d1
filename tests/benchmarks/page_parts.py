"""What every section of docs/benchmarks.md is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tests.benchmarks.results import Provenance

QUIET = 0.1
"""Share of the CPU that others may take during a run whose figures mean something."""

RANDOM, SHARED = "runs/benchmarks/random", "runs/benchmarks/random-shared"
_WRITE = "python -m tests.benchmarks.random_bundle"
_BUNDLES = {"random": f"{_WRITE} {RANDOM}", "random-shared": f"{_WRITE} {SHARED} --shared"}
"""By name, how a bundle of random weights is made."""


def repeat(command: str, bundle: str) -> str:
    """A run's command, with the making of its bundle before it."""
    return f"{_BUNDLES[bundle]} && {command}" if bundle in _BUNDLES else command


def is_quiet(of: Provenance) -> bool:
    """Whether others took no more than QUIET; without, nothing is judged."""
    return of.others_cpu <= QUIET


def origin(of: Provenance, command: str, name: str = "") -> str:
    """Where figures come from. name: of what, where a section has several."""
    versions = ", ".join(f"{library} {number}" for library, number in of.versions.items())
    share = f"{100 * of.others_cpu:.0f} %"
    lines = [
        f"- {name + ': ' if name else ''}`{command}`",
        f"- {of.machine}; {versions}; seed {of.seed}; {of.date}; CPU taken by others meanwhile: {share}\n",
    ]
    if not is_quiet(of):
        lines.append(f"> **Not a quiet machine**: others took {share} of the CPU. Do not rely on these figures.\n")
    return "\n".join(lines)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def short(figure: float) -> str:
    """Three digits, and never an exponent for a large one."""
    return f"{figure:.0f}" if figure >= 100 else f"{figure:.3g}"
