"""What a call costs: milliseconds per (graph, size of image, batch size), measured here, kept beside the engine.

The batcher asks it which batch size to run; the bundle cannot say, for it depends on the machine.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ValidationError

from engines.cache import EngineKey
from engines.errors import BackendError
from engines.manifest import Frozen

COST_FILE = "cost.json"
MAX_COST_BYTES = 64 * 1024


@dataclass(frozen=True)
class CostTable:
    """ms: by call (``engines.calls``), then by rung, the median time of one."""

    ms: Mapping[str, Mapping[int, float]]

    def step_ms(self, call: str, rung: int) -> float:
        """Milliseconds of one call with ``rung`` rows. Raises: KeyError when it was not measured."""
        return self.ms[call][rung]

    def row_ms(self, call: str) -> float:
        """Milliseconds a row takes at the rung that makes most of them. Raises: KeyError."""
        return min(ms / rung for rung, ms in self.ms[call].items())

    def best_rung(self, call: str, waiting: int) -> int:
        """The rung that advances most rows per millisecond when ``waiting`` rows could go; the larger of equals."""
        if waiting < 1:
            raise ValueError(f"best_rung needs a row that waits, not {waiting}")
        costs = self.ms[call]
        return max(costs, key=lambda rung: (min(rung, waiting) / costs[rung], rung if rung <= waiting else -rung))


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


def load_costs(keys: Mapping[str, EngineKey], rungs: Sequence[int], cache_dir: Path) -> CostTable | None:
    """The kept table of these calls and rungs, or None where any of it is missing, foreign or damaged."""
    table = {}
    for call, key in keys.items():
        record = _read(key.folder(cache_dir) / COST_FILE)
        if record is None or not _fits(record, key, rungs):
            return None
        table[call] = {rung: record.ms[rung] for rung in rungs}
    return CostTable(table)


def save_costs(table: CostTable, keys: Mapping[str, EngineKey], cache_dir: Path, repeats: int) -> None:
    """Keep a table, one file a call, each replaced whole. Raises: BackendError when it cannot be written."""
    for call, key in keys.items():
        record = _Record(**asdict(key), repeats=repeats, ms=dict(table.ms[call]))
        folder = key.folder(cache_dir)
        partial = folder / f"{COST_FILE}.{secrets.token_hex(8)}"  # pids repeat from container to container
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial.write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
            partial.replace(folder / COST_FILE)
        except OSError as error:
            raise BackendError(f"cannot keep costs in {folder}: {error}; choose another cache") from error


def _read(file: Path) -> _Record | None:
    try:
        if file.stat().st_size > MAX_COST_BYTES:
            return None
        return _Record.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def _fits(record: _Record, key: EngineKey, rungs: Sequence[int]) -> bool:
    if EngineKey(**record.model_dump(include=set(asdict(key)))) != key:
        return False
    return all(rung in record.ms and math.isfinite(record.ms[rung]) and record.ms[rung] > 0 for rung in rungs)
