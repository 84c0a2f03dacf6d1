"""Rows of several sizes on one engine thread: never in one step, in turns, at the price of their size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engines.bundle import verify_bundle
from engines.calls import calls
from engines.cost import CostTable
from server.costs import UNKNOWN_ROW_S, CostBook, Offer
from server.engine_thread import EngineThread
from server.jobs import Job, Lease
from server.request import DenoiseRequest
from server.work import Event, Failed, Made, Stepped
from tests.support.fake_engines import RUNGS, Bench

NAME = "toy-sized"


def lease(name: str, width: int, height: int, n: int = 1) -> Lease:
    request = DenoiseRequest(
        model=NAME, prompt="seven", n=n, seed=1, guidance_scale=2.0, steps=4, width=width, height=height
    )
    return Lease(job=Job(id=name, request=request, cost_s=0.0), worker="w", attempt=1, queued_ms=0)


def run(bundle: Path, leases: list[Lease]) -> list[Event]:
    """What the engine thread reports of jobs that join together, turn by turn, until nothing waits."""
    engine, events = EngineThread({NAME: Bench(bundle).pipeline}), list[Event]()
    engine._report = events.extend
    for each in leases:
        engine.join_job(each)
    engine._receive()
    engine._turn()
    while len(engine._batcher):
        engine._turn()
    return events


def test_sizes_take_turns_and_never_share_a_step(sized_bundle: Path) -> None:
    events = run(sized_bundle, [lease("many", 64, 64, n=10), lease("wide", 96, 64), lease("high", 64, 128)])
    steps = [(event.size, event.rows) for event in events if isinstance(event, Stepped)]
    assert steps[:9] == [("64x64", 8), ("96x64", 1), ("64x128", 1)] * 3
    assert {size for size, _ in steps[9:12]} == {"64x64", "96x64", "64x128"}
    assert sum(rows for size, rows in steps if size == "64x64") == 10 * 4
    made = {event.token.partition("/")[0]: event.pixels for event in events if isinstance(event, Made)}
    assert {name: pixels[0].shape for name, pixels in made.items()} == {
        "many": (8, 8, 3),  # fake engines do not enlarge
        "wide": (8, 12, 3),
        "high": (16, 8, 3),
    }


def test_a_row_is_the_same_in_the_company_of_other_sizes(sized_bundle: Path) -> None:
    def wide(leases: list[Lease]) -> bytes:
        events = run(sized_bundle, leases)
        [made] = [event for event in events if isinstance(event, Made) and event.token.startswith("wide")]
        return made.pixels[0].tobytes()

    company = [lease("many", 64, 64, n=3), lease("wide", 96, 64), lease("high", 64, 128, n=2)]
    assert wide(company) == wide([lease("wide", 96, 64)])


def test_a_size_that_the_bundle_lost_fails_that_request_alone(sized_bundle: Path) -> None:
    events = run(sized_bundle, [lease("small", 32, 32), lease("wide", 96, 64)])
    [failed] = [event for event in events if isinstance(event, Failed)]
    assert failed.token.startswith("small")
    assert "64x64, 96x64, 64x128" in failed.failure.message
    assert [event.token.partition("/")[0] for event in events if isinstance(event, Made)] == ["wide"]


def test_a_request_costs_what_its_size_costs(sized_bundle: Path) -> None:
    manifest = verify_bundle(sized_bundle).manifest
    ms = {str(call): dict.fromkeys(RUNGS, float(call.size.width * call.size.height)) for call in calls(manifest)}
    book, small = CostBook(), lease("a", 64, 64).job.request
    high = small.model_copy(update={"height": 128})
    assert book.predicted_s(manifest, small) == UNKNOWN_ROW_S
    book.update({"worker": {NAME: Offer(engine="fake 1 float32", ms=ms)}})
    assert book.predicted_s(manifest, high) == pytest.approx(2 * book.predicted_s(manifest, small))
    del ms["decode@64x128"]
    book.update({"worker": {NAME: Offer(engine="fake 1 float32", ms=ms)}})
    assert book.predicted_s(manifest, high) == UNKNOWN_ROW_S


def test_the_batch_size_is_the_sizes_own(sized_bundle: Path) -> None:
    """Where large images gain nothing from company, they step alone; small ones do not."""
    bench = Bench(sized_bundle)
    costs = bench.pipeline.costs
    assert costs is not None
    dear = {f"step@{size}": {rung: float(rung**2) for rung in RUNGS} for size in ("96x64", "64x128")}
    bench.pipeline.costs = replace(costs, ms={**costs.ms, **dear})
    assert isinstance(bench.pipeline.costs, CostTable)
    engine, events = EngineThread({NAME: bench.pipeline}), list[Event]()
    engine._report = events.extend
    for each in (lease("small", 64, 64, n=4), lease("wide", 96, 64, n=4)):
        engine.join_job(each)
    engine._receive()
    for _ in range(2):
        engine._turn()
    assert [(e.size, e.rung) for e in events if isinstance(e, Stepped)] == [("64x64", 4), ("96x64", 1)]
