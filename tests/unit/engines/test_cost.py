"""Costs: the best rung follows from the table alone, and only our own files are believed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engines.backends.base import EngineBackend, Rows
from engines.backends.load import engine_key
from engines.bundle import Bundle
from engines.cache import EngineKey
from engines.calls import calls
from engines.cost import COST_FILE, MAX_COST_BYTES, CostTable, climb, load_costs, save_costs
from engines.errors import BackendError, OutOfMemoryError
from engines.measure import measure_costs
from engines.open import kept_costs, know_costs, open_pipeline
from server.engine_around import EngineAround

STEP = {"step"}
KEY = EngineKey(graph_sha256="a" * 64, engine="openvino 1.2 float32", machine="a CPU, 2 cores", threads=0)
TABLE = CostTable({"step": {1: 5.0, 2: 6.0, 4: 8.5}})
RUNGS = (1, 2, 4)


@pytest.mark.parametrize(
    ("ms", "waiting", "best"),
    [
        ({1: 5, 2: 6, 4: 8}, 1, 1),
        ({1: 5, 2: 6, 4: 8}, 2, 2),
        ({1: 5, 2: 6, 4: 8}, 3, 4),  # three of four places taken, still most rows per millisecond
        ({1: 5, 2: 6, 4: 8}, 100, 4),
        ({1: 5, 2: 10, 4: 40}, 4, 2),  # batching costs more than it brings; of equals the larger
        ({1: 5, 2: 11, 4: 40}, 4, 1),
        ({1: 5, 2: 5, 4: 5, 8: 5}, 3, 4),  # free places: the smallest that holds all
        ({1: 5, 2: 6, 4: 30}, 3, 2),
    ],
)
def test_best_rung_advances_most_rows_per_millisecond(ms: dict[int, float], waiting: int, best: int) -> None:
    assert CostTable({"step": ms}).best_rung("step", waiting) == best


@given(
    ms=st.dictionaries(st.sampled_from([1, 2, 4, 8, 16]), st.floats(0.1, 1e3), min_size=1),
    waiting=st.integers(1, 40),
)
def test_no_rung_does_better_than_the_best(ms: dict[int, float], waiting: int) -> None:
    best = CostTable({"step": ms}).best_rung("step", waiting)
    run_at = min((rung for rung in ms if rung >= waiting), default=max(ms))
    rates = [min(rung, waiting) / cost for rung, cost in ms.items() if rung <= run_at]
    assert min(best, waiting) / ms[best] == max(rates)
    assert best <= run_at


def test_best_rung_needs_a_row() -> None:
    with pytest.raises(ValueError, match="needs a row that waits"):
        TABLE.best_rung("step", 0)


@pytest.mark.parametrize(
    ("ms", "rows", "rungs"),
    [
        ({1: 3, 2: 5, 4: 9, 8: 17}, 5, (4, 1)),  # a call more is cheaper than three empty places
        ({1: 10, 4: 11, 8: 14}, 5, (8,)),  # and here it is not
        ({1: 1, 2: 2, 4: 4}, 4, (4,)),  # of equals the fewest calls
        ({1: 5, 2: 5, 4: 5}, 3, (4,)),
        ({1: 5, 2: 6, 4: 30}, 4, (2, 2)),
        ({4: 4}, 9, (4, 4, 4)),
    ],
)
def test_rows_that_wait_for_no_others_take_the_calls_of_least_time(
    ms: dict[int, float], rows: int, rungs: tuple[int, ...]
) -> None:
    assert CostTable({"decode": ms}).split("decode", rows) == rungs


@given(
    ms=st.dictionaries(st.sampled_from([1, 2, 4, 8]), st.integers(1, 50), min_size=1),
    rows=st.integers(1, 6),
)
@settings(deadline=None)
def test_no_split_takes_less_time(ms: dict[int, float], rows: int) -> None:
    """Of those whose calls run at the rungs that they name: the last at the smallest that holds what is left."""
    found = CostTable({"decode": ms}).split("decode", rows)
    ways = [way for calls in range(1, rows + 1) for way in product(ms, repeat=calls)]
    run = [way for way in ways if way[-1] == min((r for r in ms if r >= rows - sum(way[:-1]) > 0), default=None)]
    assert sum(ms[rung] for rung in found) == min(sum(ms[r] for r in way) for way in run)
    assert found in run


def test_a_pipeline_decodes_in_the_calls_of_least_time(toy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, called = open_pipeline(toy.path, rungs=(1, 4, 8), warm=False), list[int]()
    latents = list(np.random.default_rng(0).standard_normal((5, 1, 8, 8)).astype(np.float32))
    whole, engine = pipeline.decode(latents), pipeline.engine("decode")
    run = engine.run

    def watched(inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        called.append(len(inputs["latent"]))
        return run(inputs)

    monkeypatch.setattr(engine, "run", watched)
    pipeline.costs = CostTable({str(call): {1: 3.0, 4: 9.0, 8: 17.0} for call in calls(pipeline.manifest)})
    np.testing.assert_array_equal(pipeline.decode(latents), whole)
    assert called == [4, 1]


def test_a_kept_table_comes_back(tmp_path: Path) -> None:
    save_costs(TABLE, {"step": KEY}, tmp_path, repeats=3, steps=STEP)
    assert load_costs({"step": KEY}, RUNGS, tmp_path, STEP) == TABLE


def test_a_table_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BackendError, match=r"cannot keep costs in .*/file/.*; choose another cache"):
        save_costs(TABLE, {"step": KEY}, tmp_path / "file", repeats=3, steps=STEP)


@pytest.mark.parametrize(
    "other",
    [
        replace(KEY, graph_sha256="b" * 64),
        replace(KEY, engine="openvino 1.3 float32"),
        replace(KEY, machine="another CPU, 2 cores"),
        replace(KEY, threads=1),
    ],
)
def test_another_graph_engine_machine_or_thread_count_is_another_key(tmp_path: Path, other: EngineKey) -> None:
    save_costs(TABLE, {"step": KEY}, tmp_path, repeats=3, steps=STEP)
    assert load_costs({"step": other}, RUNGS, tmp_path, STEP) is None
    carried = other.folder(tmp_path)
    carried.mkdir()
    (KEY.folder(tmp_path) / COST_FILE).rename(carried / COST_FILE)
    assert load_costs({"step": other}, RUNGS, tmp_path, STEP) is None


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan, "fast", None])
def test_a_damaged_cost_is_not_believed(tmp_path: Path, value: object) -> None:
    save_costs(TABLE, {"step": KEY}, tmp_path, repeats=3, steps=STEP)
    file = KEY.folder(tmp_path) / COST_FILE
    record = json.loads(file.read_text(encoding="utf-8"))
    record["ms"]["2"] = value
    file.write_text(json.dumps(record), encoding="utf-8")
    assert load_costs({"step": KEY}, RUNGS, tmp_path, STEP) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b" " * (MAX_COST_BYTES + 1)])
def test_a_file_that_is_no_record_is_not_believed(tmp_path: Path, content: bytes) -> None:
    save_costs(TABLE, {"step": KEY}, tmp_path, repeats=3, steps=STEP)
    (KEY.folder(tmp_path) / COST_FILE).write_bytes(content)
    assert load_costs({"step": KEY}, RUNGS, tmp_path, STEP) is None


def test_a_missing_rung_means_measuring_again(tmp_path: Path) -> None:
    save_costs(TABLE, {"step": KEY}, tmp_path, repeats=3, steps=STEP)
    assert load_costs({"step": KEY}, (1, 2, 8), tmp_path, STEP) is None


def test_rungs_beyond_a_long_call_are_neither_asked_for_nor_missed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ms = {"step": {1: 500.0, 2: 900.0, 4: 1700.0}, "decode": {1: 1100.0, 2: 2000.0, 4: 4000.0}}
    asked = []

    def column(rung: int) -> dict[str, float]:
        asked.append(rung)
        return {call: row[rung] for call, row in ms.items()}

    table = climb(RUNGS, column)
    assert asked == [1, 2]
    assert table.rungs == (1, 2)
    assert "no call is given more rows than 2 here: decode then takes 2.0 s" in caplog.text
    keys = {call: replace(KEY, graph_sha256=call) for call in ms}
    save_costs(table, keys, tmp_path, repeats=3, steps=STEP)
    assert load_costs(keys, (1, 2, 4, 8), tmp_path, STEP) == table
    assert load_costs(keys, (1,), tmp_path, STEP) == CostTable({"step": {1: 500.0}, "decode": {1: 1100.0}})


def too_large_from(rung: int) -> Callable[[int], dict[str, float]]:
    """5 ms a call; no memory from this rung on."""

    def column(asked: int) -> dict[str, float]:
        if asked >= rung:
            raise OutOfMemoryError(f"no memory for {asked} rows: give smaller --rungs")
        return {"step": 5.0, "decode": 5.0}

    return column


def test_a_rung_that_does_not_fit_is_the_top_of_the_ladder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = climb((1, 2, 4, 8), too_large_from(4))
    assert (table.rungs, table.too_large) == ((1, 2), 4)
    assert "no call is given more rows than 2 here, for 4 do not fit: no memory for 4 rows" in caplog.text
    assert "give smaller --rungs" in caplog.text
    keys = {call: replace(KEY, graph_sha256=call) for call in table.ms}
    save_costs(table, keys, tmp_path, repeats=3, steps=STEP)
    assert load_costs(keys, (1, 2, 4, 8), tmp_path, STEP) == table
    assert load_costs(keys, (1, 2), tmp_path, STEP) == replace(table, too_large=None)
    assert load_costs(keys, (4, 8), tmp_path, STEP) is None


def test_a_graph_that_bundles_share_tells_nothing_of_the_others_memory(tmp_path: Path) -> None:
    """As two of one autoencoder: that one found no memory for 8 rows leaves what the other measured."""
    one, other = ({"step": replace(KEY, graph_sha256=name), "decode": KEY} for name in ("one", "other"))
    whole = CostTable({call: {1: 1.0, 2: 1.5, 4: 2.0, 8: 3.0} for call in ("step", "decode")})
    save_costs(whole, one, tmp_path, repeats=3, steps=STEP)
    short = CostTable({call: {1: 1.1, 2: 1.6, 4: 2.1} for call in ("step", "decode")}, too_large=8)
    save_costs(short, other, tmp_path, repeats=3, steps=STEP)
    both = load_costs(one, (1, 2, 4, 8), tmp_path, STEP), load_costs(other, (1, 2, 4, 8), tmp_path, STEP)
    assert [table and (table.rungs, table.too_large) for table in both] == [((1, 2, 4, 8), None), ((1, 2, 4), 8)]
    save_costs(CostTable({"step": {1: 1.2, 3: 2.0}, "decode": {1: 1.2, 3: 2.0}}), one, tmp_path, 3, STEP)
    kept = load_costs(one, (1, 2, 4, 8), tmp_path, STEP)
    assert kept is not None
    assert kept.ms["step"] == {1: 1.2, 2: 1.5, 4: 2.0, 8: 3.0}


def test_no_rung_is_chosen_that_its_rows_would_not_run_at() -> None:
    """A call is padded to the smallest rung that holds its rows, though a larger one takes less time."""
    costs = CostTable({"step": {1: 5.0, 4: 8.0, 8: 7.0}})
    assert costs.best_rung("step", 3) == 4
    assert costs.split("step", 3) == (4,)
    assert (costs.best_rung("step", 5), costs.split("step", 5)) == (8, (8,))
    assert costs.best_rung("step", 20) == 8


def test_where_not_even_the_smallest_rung_fits_it_is_said() -> None:
    with pytest.raises(OutOfMemoryError, match=r"not even the smallest batch size fits.*for 1 rows.*--rungs"):
        climb(RUNGS, too_large_from(1))


def test_what_fails_for_another_reason_than_memory_is_passed_on() -> None:
    def fails(rung: int) -> dict[str, float]:
        if rung > 1:
            raise BackendError("no such kernel")
        return {"step": 5.0}

    with pytest.raises(BackendError, match="no such kernel"):
        climb(RUNGS, fails)


class Crowded(EngineAround):
    """On a device with room for so many rows a call, and for so many over all batch sizes made ready.

    It keeps what is ready, as a CUDA engine does, until that is released.
    """

    call_rows, all_rows = 1000, 1000

    def __init__(self, engine: EngineBackend) -> None:
        super().__init__(engine)
        self.ready: list[int] = []

    def run(self, rows: Rows) -> dict[str, NDArray[Any]]:
        count = len(next(iter(rows.values())))
        if count not in self.ready:
            if count > self.call_rows or sum(self.ready) + count > self.all_rows:
                raise OutOfMemoryError(f"no memory for {count} rows: give smaller --rungs")
            self.ready.append(count)
        return self._engine.run(rows)

    def release(self) -> bool:
        self.ready.clear()
        return True


@pytest.mark.parametrize(
    ("call_rows", "all_rows", "rungs"),
    [(1000, 1000, (1, 2, 4)), (3, 1000, (1, 2)), (1000, 5, (1, 2)), (1, 1, (1,))],
)
def test_what_fits_is_made_ready_the_largest_first_and_served(
    toy: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call_rows: int,
    all_rows: int,
    rungs: tuple[int, ...],
) -> None:
    """Measured, then from the kept costs."""
    monkeypatch.setattr(Crowded, "call_rows", call_rows)
    monkeypatch.setattr(Crowded, "all_rows", all_rows)
    for _ in range(2):
        pipeline = open_pipeline(toy.path, "onnxruntime", rungs=RUNGS, warm=False)
        pipeline.wrap_engines(lambda _, engine: Crowded(engine))
        know_costs(pipeline, "onnxruntime", "auto", 0, tmp_path, repeats=1)
        assert pipeline.rungs == rungs
        for graph in toy.manifest.graphs:
            engine = pipeline.engine(graph)
            assert isinstance(engine, Crowded)
            assert engine.ready == sorted(rungs, reverse=True)
        pipeline.close()
    assert kept_costs(toy, "onnxruntime", "auto", 0, tmp_path, RUNGS) == pipeline.costs


def test_kept_costs_give_way_where_there_is_less_memory_now(
    toy: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    open_pipeline(toy.path, "onnxruntime", rungs=RUNGS, cache_dir=tmp_path).close()
    pipeline = open_pipeline(toy.path, "onnxruntime", rungs=RUNGS, warm=False)
    pipeline.wrap_engines(lambda _, engine: Crowded(engine))
    monkeypatch.setattr(Crowded, "call_rows", 2)
    know_costs(pipeline, "onnxruntime", "auto", 0, tmp_path)
    assert pipeline.max_rows == 2
    assert "no call is given more rows than 2 here: no memory for 4 rows" in caplog.text
    monkeypatch.setattr(Crowded, "call_rows", 0)
    pipeline.release()
    with pytest.raises(OutOfMemoryError, match=r"not even the smallest batch size fits.*for 1 rows.*--rungs"):
        know_costs(pipeline, "onnxruntime", "auto", 0, tmp_path)
    pipeline.close()


def test_a_rung_that_was_given_up_is_not_run_whether_costs_are_known_or_not(toy: Bundle) -> None:
    pipeline = open_pipeline(toy.path, "onnxruntime", rungs=(1, 2, 4, 8), warm=False)
    pipeline.give_up(8)
    assert pipeline.rungs == (1, 2, 4)
    pipeline.costs = CostTable({str(call): dict.fromkeys(RUNGS, 1.0) for call in calls(pipeline.manifest)})
    pipeline.give_up(4)
    assert (pipeline.rungs, pipeline.costs.too_large) == ((1, 2), 4)


def test_a_model_of_long_calls_runs_the_smallest_rung_alone(
    toy: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.cost.LONG_S", 0.0)
    for _ in ("measured", "kept"):
        pipeline = open_pipeline(toy.path, "openvino", cache_dir=tmp_path)
        assert pipeline.rungs == (1,)
        assert pipeline.max_rows == 1
        assert len(list(tmp_path.glob("*/models/*.blob"))) == len(toy.manifest.graphs)
        pipeline.close()


@pytest.mark.parametrize(("seconds", "calls"), [(0.1, 4), (1.0, 4), (1.5, 3), (40.0, 2)])
def test_a_long_call_is_timed_less_often(
    toy: Bundle, monkeypatch: pytest.MonkeyPatch, seconds: float, calls: int
) -> None:
    """3 repeats after one to warm up, as long as 3 s are not over."""
    now, runs = 0.0, 0

    class Timed(EngineAround):
        def run(self, rows: Rows) -> dict[str, NDArray[Any]]:
            nonlocal now, runs
            now, runs = now + seconds, runs + 1
            return {}

    pipeline = open_pipeline(toy.path, "onnxruntime", rungs=(1,), warm=False)
    pipeline.wrap_engines(lambda _, engine: Timed(engine))
    monkeypatch.setattr("engines.measure.time", SimpleNamespace(perf_counter=lambda: now))
    costs = measure_costs(pipeline, repeats=3)
    assert runs == calls * len(toy.manifest.graphs)
    assert all(row == {1: pytest.approx(1000 * seconds)} for row in costs.ms.values())


def test_a_cost_is_the_median_of_what_calls_took_after_the_first(
    toy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, took = 0.0, cycle((0.9, 0.1, 0.4, 0.2))

    class Timed(EngineAround):
        def run(self, rows: Rows) -> dict[str, NDArray[Any]]:
            nonlocal now
            now += next(took)
            return {}

    pipeline = open_pipeline(toy.path, "onnxruntime", rungs=(1,), warm=False)
    pipeline.wrap_engines(lambda _, engine: Timed(engine))
    monkeypatch.setattr("engines.measure.time", SimpleNamespace(perf_counter=lambda: now))
    costs = measure_costs(pipeline, repeats=3)
    assert all(row == {1: pytest.approx(200)} for row in costs.ms.values())


def test_opening_measures_once_then_takes_the_kept_table(toy: Bundle, tmp_path: Path) -> None:
    first = open_pipeline(toy.path, "onnxruntime", rungs=(1, 2), cache_dir=tmp_path).costs
    assert first is not None
    assert first.ms.keys() == toy.manifest.graphs.keys()
    assert all(cost > 0 for row in first.ms.values() for cost in row.values())
    assert open_pipeline(toy.path, "onnxruntime", rungs=(1, 2), cache_dir=tmp_path).costs == first
    key = engine_key(toy, "step_4", "onnxruntime", "auto", 0)
    (key.folder(tmp_path) / COST_FILE).write_text("{}", encoding="utf-8")
    again = open_pipeline(toy.path, "onnxruntime", rungs=(1, 2), cache_dir=tmp_path).costs
    assert again is not None
    assert again.ms["step_4"].keys() == {1, 2}


def test_costs_that_cannot_be_kept_stop_no_server_but_a_build(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise BackendError("cannot keep costs: no space left")

    monkeypatch.setattr("engines.open.save_costs", full)
    pipeline = open_pipeline(toy_bundle, "onnxruntime", cache_dir=tmp_path, rungs=(1,))
    assert pipeline.costs is not None
    assert "no space left; measured again at the next start" in caplog.text
    with pytest.raises(BackendError, match="no space left"):
        know_costs(pipeline, "onnxruntime", "auto", 0, tmp_path, again=True)
    pipeline.close()
