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


def quiet_note(busiest: float) -> str:
    """A warning where others took more than QUIET."""
    if busiest <= QUIET:
        return ""
    share = f"{100 * busiest:.0f} %"
    return f"> **Not a quiet machine**: others took {share} of the CPU during a run. Do not trust these figures.\n"


def origin(of: Provenance, command: str, name: str = "") -> str:
    """Where figures come from. name: of what, where a section has several."""
    versions = ", ".join(f"{library} {number}" for library, number in of.versions.items())
    lines = [
        f"- {name + ': ' if name else ''}`{command}`",
        f"- {of.machine}; {versions}; seed {of.seed}; {of.date}; "
        f"CPU taken by others meanwhile: {100 * of.others_cpu:.0f} %\n",
    ]
    return "\n".join(lines)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
