"""What calls cost and which batch size they take: a cost table, remembered call by call."""

from __future__ import annotations

from functools import cache

from engines.cost import CostTable


class Prices:
    """best_rung: as of ``CostTable``; call_ms: see ``_call_ms``. Both remember what they are asked so often."""

    def __init__(self, table: CostTable) -> None:
        self.table = table
        self.best_rung = cache(table.best_rung)
        self.call_ms = cache(self._call_ms)

    def _call_ms(self, call: str, rows: int) -> float:
        """Milliseconds of ``rows`` ≥ 1 rows as a pipeline runs them: padded to a rung, in several calls beyond
        the largest.
        """
        costs = self.table.ms[call]
        largest = max(costs)
        if rows > largest:
            return self._call_ms(call, largest) + self._call_ms(call, rows - largest)
        return costs[min(rung for rung in costs if rung >= rows)]
