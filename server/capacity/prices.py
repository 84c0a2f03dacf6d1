"""What calls cost and which batch size they take: a cost table, remembered call by call."""

from __future__ import annotations

from functools import cache

from engines.cost import CostTable


class Prices:
    """best_rung: as of ``CostTable``; step_ms, stage_ms: see below. All remember what they are asked so often."""

    def __init__(self, table: CostTable) -> None:
        self.table = table
        self.best_rung = cache(table.best_rung)
        self.step_ms = cache(self._step_ms)
        self.stage_ms = cache(self._stage_ms)

    def _step_ms(self, call: str, rows: int) -> float:
        """Milliseconds of a step of ``rows`` ≥ 1 rows, padded to a rung as a pipeline does."""
        costs = self.table.ms[call]
        return costs[min(rung for rung in costs if rung >= rows)]

    def _stage_ms(self, call: str, rows: int) -> float:
        """Milliseconds of ``rows`` ≥ 1 rows in another stage, in the calls that a pipeline splits them into."""
        return sum(self.table.ms[call][rung] for rung in self.table.split(call, rows))
