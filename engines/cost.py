"""What a call costs: milliseconds per (graph, size of image, batch size), measured here, kept beside the engine.

The batcher asks it which batch size to run; the bundle cannot say, for it depends on the machine.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ValidationError

from engines.cache import EngineKey
from engines.errors import BackendError, OutOfMemoryError
from engines.manifest import Frozen

_log = logging.getLogger(__name__)

LONG_S = 2.0
"""A call that takes this long keeps its processor busy by itself: more rows would bring nothing, and whoever comes
or goes meanwhile would wait for all of them."""

COST_FILE = "cost.json"
MAX_COST_BYTES = 64 * 1024


@dataclass(frozen=True)
class CostTable:
    """ms: by call (``engines.calls``), then by rung, the median time of one. too_large: a rung that did not fit."""

    ms: Mapping[str, Mapping[int, float]]
    too_large: int | None = None

    @property
    def rungs(self) -> tuple[int, ...]:
        """Ascending."""
        return tuple(sorted(next(iter(self.ms.values()), {})))

    def below(self, rung: int) -> CostTable:
        """What is left once ``rung`` turns out not to fit."""
        kept = {call: {r: ms for r, ms in row.items() if r < rung} for call, row in self.ms.items()}
        return CostTable(kept, rung)

    def step_ms(self, call: str, rung: int) -> float:
        """Milliseconds of one call with ``rung`` rows. Raises: KeyError when it was not measured."""
        return self.ms[call][rung]

    def row_ms(self, call: str) -> float:
        """Milliseconds a row takes at the rung that makes most of them. Raises: KeyError."""
        return min(ms / rung for rung, ms in self.ms[call].items())

    def best_rung(self, call: str, waiting: int) -> int:
        """The rung that advances most rows per millisecond when ``waiting`` rows could go; the larger of equals.

        None that is larger than what holds them all: a call runs at the smallest rung that holds its rows.
        """
        if waiting < 1:
            raise ValueError(f"best_rung needs a row that waits, not {waiting}")
        costs = self._holding(call, waiting)
        return max(costs, key=lambda rung: (min(rung, waiting) / costs[rung], rung if rung <= waiting else -rung))

    def split(self, call: str, rows: int) -> tuple[int, ...]:
        """The rungs, in turn, in which ``rows`` rows take the least time; of equals, the fewest calls.

        All but the last are full, and that one is the smallest which holds what is left.
        """
        ways: list[tuple[float, int, tuple[int, ...]]] = [(0.0, 0, ())]  # by rows: milliseconds, calls, rungs
        for n in range(1, rows + 1):
            costs = self._holding(call, n)
            after = [(rung, ways[max(0, n - rung)]) for rung in costs]
            ways.append(min((costs[rung] + ms, count + 1, (*rungs, rung)) for rung, (ms, count, rungs) in after))
        return ways[rows][2][::-1]

    def _holding(self, call: str, rows: int) -> dict[int, float]:
        """Milliseconds by rung, up to the smallest that holds so many rows."""
        costs = self.ms[call]
        largest = min((rung for rung in costs if rung >= rows), default=max(costs))
        return {rung: ms for rung, ms in costs.items() if rung <= largest}


def climb(rungs: Sequence[int], column: Callable[[int], Mapping[str, float]]) -> CostTable:
    """The costs of ascending rungs, up to the first at which a call takes ``LONG_S``: larger ones are not worth it.

    column: milliseconds by call of one rung, asked from the smallest on. Where it raises OutOfMemoryError, the rung
    before was the last. Raises: OutOfMemoryError when there is none before; whatever else ``column`` raises.
    """
    table: dict[str, dict[int, float]] = {}
    for rung in rungs:
        try:
            ms = column(rung)
        except OutOfMemoryError as error:
            if rung == rungs[0]:
                raise OutOfMemoryError(f"not even the smallest batch size fits into memory: {error}") from error
            largest = max(r for r in rungs if r < rung)
            _log.warning("no call is given more rows than %d here, for %d do not fit: %s", largest, rung, error)
            return CostTable(table, rung)
        for call in ms:
            table.setdefault(call, {})[rung] = ms[call]
        slowest = max(ms, key=lambda call: ms[call])
        seconds = ms[slowest] / 1000
        if seconds >= LONG_S and rung != rungs[-1]:
            _log.warning("no call is given more rows than %d here: %s then takes %.1f s", rung, slowest, seconds)
            break
    return CostTable(table)


class _Record(Frozen):
    """A cost file. The key stands in it in full, so a file that strayed in from elsewhere is recognised."""

    graph_sha256: str
    engine: str
    machine: str
    threads: int
    size: str = ""
    source: str = ""
    repeats: int
    ms: dict[int, float]
    too_large: int | None = None


def load_costs(
    keys: Mapping[str, EngineKey], rungs: Sequence[int], cache_dir: Path, steps: Set[str]
) -> CostTable | None:
    """The kept table of these calls and ascending rungs, or None where any of it is missing, foreign or damaged.

    Rungs that are not worth it, or did not fit (``climb``), need not be there. steps: as of ``save_costs``.
    """
    tables = [_read(call, key, cache_dir) for call, key in keys.items()]
    limits = [table.too_large for table in tables if table.too_large is not None and steps & table.ms.keys()]

    def column(rung: int) -> dict[str, float]:
        for limit in limits:
            if rung >= limit:
                raise OutOfMemoryError("it was so when they were measured, as python -m engines build does again")
        return {call: row[rung] for table in tables for call, row in table.ms.items()}

    try:
        return climb(rungs, column)
    except (KeyError, OutOfMemoryError):
        return None


def save_costs(
    table: CostTable, keys: Mapping[str, EngineKey], cache_dir: Path, repeats: int, steps: Set[str]
) -> None:
    """Keep a table, one file a call, each replaced whole. steps: the calls that are a bundle's own.

    Other bundles share files of the rest, as of an autoencoder: what did not fit is said of the steps alone, and
    rungs that were measured for others stay. Raises: BackendError when it cannot be written.
    """
    for call, key in keys.items():
        limit = table.too_large if call in steps else None
        before = {r: ms for r, ms in _read(call, key, cache_dir).ms[call].items() if limit is None or r < limit}
        record = _Record(**asdict(key), repeats=repeats, ms={**before, **table.ms[call]}, too_large=limit)
        folder = key.folder(cache_dir)
        partial = folder / f"{COST_FILE}.{secrets.token_hex(8)}"  # pids repeat from container to container
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
            partial.replace(folder / COST_FILE)
        except OSError as error:
            raise BackendError(f"cannot keep costs in {folder}: {error}; choose another cache") from error


def _read(call: str, key: EngineKey, cache_dir: Path) -> CostTable:
    """Of one call, what can be believed; no rungs of a file that is missing, foreign or damaged."""
    file, nothing = key.folder(cache_dir) / COST_FILE, CostTable({call: {}})
    try:
        if file.stat().st_size > MAX_COST_BYTES:
            return nothing
        record = _Record.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return nothing
    if EngineKey(**record.model_dump(include=set(asdict(key)))) != key:
        return nothing
    believed = {rung: ms for rung, ms in record.ms.items() if math.isfinite(ms) and ms > 0}
    return CostTable({call: believed}, record.too_large)
