"""What a load run measured, against what was wanted: a table, and whether all of it was met."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table


class Finding(NamedTuple):
    """One line of the table."""

    what: str
    wanted: str
    measured: str
    met: bool


def report(title: str, findings: Sequence[Finding]) -> bool:
    """Print the table; whether everything was met."""
    table = Table("", "wanted", "measured", "", title=title)
    for finding in findings:
        table.add_row(*finding[:3], "met" if finding.met else "MISSED")
    Console(width=140).print(table)
    return all(finding.met for finding in findings)


def quantile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of them do not exceed; infinite where there are none."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else float("inf")
