"""A planned fleet: times added up by hand, queues that theory knows, and the engine's own turns."""

from __future__ import annotations

import math
import random
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.backends.base import RUNGS
from engines.bundle import verify_bundle
from engines.calls import calls
from engines.cost import CostTable
from server.capacity.plan import Load, Planner, admission_of, find_least, quantile
from server.capacity.prices import Prices
from server.capacity.question import Mix, PlanError
from server.capacity.traffic import Kind, kinds, poisson
from server.capacity.worker import SimulatedWorker, WorkerLimits
from server.engine_thread import EngineThread
from server.jobs import Job, Lease
from server.work import Event, Made, Stepped
from tests.support.fake_engines import Bench
from tests.support.planned import LIMITS, call, costs_of, kind_of, run_calls
from tests.support.toy_bundle import ToyOptions, make_toy_bundle


@pytest.fixture(scope="module")
def seeing_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its networks see masks, and it has an encoder."""
    options = ToyOptions(steps=(1, 2, 4), encoders=(4,), seeing=True)
    return make_toy_bundle(tmp_path_factory.mktemp("seeing") / "toy", options).path


def latencies_ms(*args: object, **kwargs: object) -> list[float]:
    return [1000 * seconds for seconds in run_calls(*args, **kwargs).latencies]  # type: ignore[arg-type]


# ---- by hand


def test_a_request_alone_takes_its_condition_steps_decoding_and_file(toy_bundle: Path) -> None:
    kind = kind_of(toy_bundle)
    limits = WorkerLimits(max_rows=64, encode_threads=2, file_s=0.002)
    assert latencies_ms(toy_bundle, [call(kind)], [kind], limits=limits) == pytest.approx([1 + 4 * 10 + 5 + 2])


def test_a_remembered_prompt_costs_nothing(toy_bundle: Path) -> None:
    kind = kind_of(toy_bundle)
    assert latencies_ms(toy_bundle, [call(kind, new_prompt=False)], [kind]) == pytest.approx([4 * 10 + 5])


def test_a_request_joins_at_the_next_step(toy_bundle: Path) -> None:
    """0-11 condition and step of a; 11-24 of b, both step; 24-36 and 36-53 with a decoded; 53-68 b alone."""
    kind = kind_of(toy_bundle)
    calls = [call(kind), call(kind, 0.005)]
    assert latencies_ms(toy_bundle, calls, [kind]) == pytest.approx([53, 68 - 5])


def test_images_of_a_request_share_steps_and_wait_for_file_threads(toy_bundle: Path) -> None:
    """Three rows run as four: 1 + 4 × 16 + 8, then three files of 4 ms on two threads."""
    kind = kind_of(toy_bundle, Mix(images={3: 1}))
    limits = WorkerLimits(max_rows=64, encode_threads=2, file_s=0.004)
    assert latencies_ms(toy_bundle, [call(kind)], [kind], limits=limits) == pytest.approx([1 + 64 + 8 + 8])


@pytest.mark.parametrize(
    ("mix", "ms"),
    [
        (Mix(tasks={"edit": 1}), 1 + 3 + 3 * 10 + 5),  # strength 0.75 runs three of four steps
        (Mix(tasks={"edit": 1}, strength=0.5), 1 + 3 + 2 * 10 + 5),
        (Mix(tasks={"inpaint": 1}), 1 + 3 + 3 + 4 * 10 + 5),  # the image, and the image without what is drawn
        (Mix(tasks={"invert": 1}), 1 + 3 + (4 + 4) * 10 + 5),  # two prompts in one call; encoder, then student
        (Mix(steps={1: 1}), 1 + 10 + 5),
    ],
)
def test_every_task_takes_its_own_way(seeing_bundle: Path, mix: Mix, ms: float) -> None:
    kind = kind_of(seeing_bundle, mix)
    assert latencies_ms(seeing_bundle, [call(kind)], [kind]) == pytest.approx([ms])


def test_two_workers_share_what_comes_at_once(toy_bundle: Path) -> None:
    """A worker claims while it has room, so a second request goes to either; with room for one, to the other."""
    kind = kind_of(toy_bundle, Mix(images={10: 1}))
    one_each = WorkerLimits(max_rows=10, encode_threads=2, file_s=0.0)
    alone_ms = latencies_ms(toy_bundle, [call(kind)], [kind])
    assert latencies_ms(toy_bundle, [call(kind), call(kind)], [kind], workers=2, limits=one_each) == alone_ms * 2
    queued = latencies_ms(toy_bundle, [call(kind), call(kind)], [kind], workers=1, limits=one_each)
    assert queued == pytest.approx([alone_ms[0], 2 * alone_ms[0]])


def test_beyond_the_queue_requests_are_refused(toy_bundle: Path) -> None:
    """One request is predicted to take (4 × 4 + 2) ms a row; two fit in 0.04 s, and the third comes at once."""
    kind = kind_of(toy_bundle)
    outcome = run_calls(toy_bundle, [call(kind) for _ in range(3)], [kind], max_queue_s=0.04)
    assert [math.isinf(seconds) for seconds in sorted(outcome.latencies)] == [False, False, True]


def test_the_nearest_rank_counts() -> None:
    assert quantile([float(k) for k in range(1, 101)], 0.99) == 99
    assert quantile([1.0, 2.0, 3.0], 0.5) == 2
    assert quantile([*[1.0] * 98, math.inf, math.inf], 0.99) is None


@pytest.mark.parametrize("rows", range(1, 33))
def test_a_call_is_padded_as_a_pipeline_pads_it(toy_bundle: Path, rows: int) -> None:
    prices = Prices(CostTable({"step": {rung: float(rung) for rung in RUNGS}}))
    bench = Bench(toy_bundle)
    rows = min(rows, bench.pipeline.max_rows)
    assert prices.step_ms("step", rows) == bench.pipeline.rung(rows)


def test_another_stage_costs_what_its_calls_cost() -> None:
    prices = Prices(CostTable({"decode": {1: 3.0, 4: 9.0, 8: 17.0}}))
    assert [prices.stage_ms("decode", rows) for rows in (1, 3, 5, 8, 13)] == [3, 9, 12, 17, 29]


# ---- against theory


def single_server(path: Path, rate: float, workers: int) -> float:
    """Mean ms of requests of one step of 10 ms whose batches bring nothing."""
    bundle = verify_bundle(path)
    free = {"decode": 1e-9, "condition": 1e-9}
    costs = CostTable({graph: {1: free.get(graph, 10.0)} for graph in bundle.manifest.graphs})
    kind = kind_of(path, Mix(steps={1: 1}), costs)
    outcome = run_calls(path, poisson([kind], rate, 20_000, 0.0, seed=1), [kind], workers=workers)
    return 1000 * statistics.fmean(outcome.latencies)


@pytest.mark.parametrize("load", [0.3, 0.5, 0.8])
def test_without_batching_it_is_the_queue_theory_knows(toy_bundle: Path, load: float) -> None:
    """M/D/1: mean wait = load / (2 (1 - load)) services (Pollaczek 1930, Khinchine 1932)."""
    expected = 10 * (1 + load / (2 * (1 - load)))
    assert single_server(toy_bundle, 100 * load, workers=1) == pytest.approx(expected, rel=0.06)


def test_workers_with_room_share_evenly_by_chance(toy_bundle: Path) -> None:
    """A random worker takes each request, so three at three times the rate are three queues of one."""
    expected = 10 * (1 + 0.5 / (2 * 0.5))
    assert single_server(toy_bundle, 150, workers=3) == pytest.approx(expected, rel=0.06)


# ---- against the engine itself


@pytest.mark.parametrize(
    ("bundle_name", "sizes"), [("toy_bundle", None), ("sized_bundle", {"64x64": 2, "64x128": 1})]
)
def test_it_takes_the_turns_that_the_engine_takes(
    request: pytest.FixtureRequest, bundle_name: str, sizes: dict[str, float] | None
) -> None:
    """The same requests before the same turns: as many rows in every step, and the same requests made."""
    path: Path = request.getfixturevalue(bundle_name)
    bundle, bench, dice = verify_bundle(path), Bench(path), random.Random(5)
    table = CostTable({str(c): {1: 5.0, 2: 6.0, 4: 9.0, 8: 20.0} for c in calls(bundle.manifest)})
    bench.pipeline.costs = table
    tasks = {"text_to_image": 3.0, "edit": 1.0, "inpaint": 1.0}
    mix = Mix(tasks=tasks, steps={1: 1, 2: 1, 4: 1}, sizes=sizes, images={1: 2, 3: 1})  # type: ignore[arg-type]
    chosen = kinds([(bundle.manifest, table)], mix)
    engine, worker = EngineThread({bundle.manifest.name: bench.pipeline}), SimulatedWorker(LIMITS)
    events: list[Event] = []
    engine._report = events.extend
    joined: dict[int, str] = {}
    for turn in range(200):
        for k in range(dice.choice([0, 0, 1, 1, 3]) if turn < 120 else 0):
            asked = call(dice.choice(chosen))
            joined[id(asked)] = f"{turn}.{k}"
            worker.take(asked, float(turn))
            engine.join_job(leased(f"{turn}.{k}", asked.kind))
        if not worker.has_work:
            continue
        engine._receive()
        engine._turn()
        planned = worker.turn()
        stepped = [event.rows for event in events if isinstance(event, Stepped)]
        made = [event.token.partition("/")[0] for event in events if isinstance(event, Made)]
        assert stepped == [planned.rows]
        assert sorted(made) == sorted(joined.pop(id(each)) for each in planned.made)
        events.clear()
    assert not joined
    assert not worker.has_work


def leased(name: str, kind: Kind) -> Lease:
    """A lease on a job of a kind, with a prompt that the toy knows."""
    request = kind.request.model_copy(update={"prompt": "one"})
    return Lease(job=Job(id=name, request=request, cost_s=0.0), worker="w", attempt=1, queued_ms=0)


# ---- whole plans


def planner(path: Path, rate: float, p99_s: float, mix: Mix | None = None, requests: int = 2000) -> Planner:
    bundle = verify_bundle(path)
    table = costs_of(bundle)
    chosen = kinds([(bundle.manifest, table)], mix or Mix())
    admission = admission_of([(bundle, table)], chosen, 30.0, 2048)
    return Planner(Load(chosen, rate, requests, 1.0, seed=3), p99_s, LIMITS, admission)


@settings(max_examples=15, deadline=None)
@given(st.floats(1, 200), st.integers(1, 5), st.integers(0, 100))
def test_every_request_is_answered_once_and_every_row_gets_its_steps(
    toy_bundle: Path, rate: float, workers: int, seed: int
) -> None:
    bundle = verify_bundle(toy_bundle)
    mix = Mix(tasks={"text_to_image": 1, "edit": 1}, steps={1: 1, 4: 1}, images={1: 1, 4: 1, 10: 1})
    chosen = kinds([(bundle.manifest, costs_of(bundle))], mix)
    calls = list(poisson(chosen, rate, 200, 0.5, seed))
    outcome = run_calls(toy_bundle, calls, chosen, workers=workers)
    assert len(outcome.latencies) == 200
    assert all(math.isfinite(seconds) for seconds in outcome.latencies)
    assert all(each.unmade == 0 for each in calls)
    assert outcome.rows == sum(each.kind.request.n * len(each.kind.route) for each in calls)
    assert outcome.busy_s <= workers * outcome.span_s * (1 + 1e-9)
    assert min(outcome.latencies) >= min(kind.least_s for kind in chosen)


def test_shares_and_rate_are_those_asked_for(toy_bundle: Path) -> None:
    bundle = verify_bundle(toy_bundle)
    chosen = kinds([(bundle.manifest, costs_of(bundle))], Mix(steps={4: 3, 8: 1}, images={1: 9, 4: 1}))
    calls = list(poisson(chosen, 20.0, 20_000, 0.25, seed=0))
    assert calls[-1].at_s == pytest.approx(1000, rel=0.03)
    assert sum(each.kind.request.steps == 8 for each in calls) == pytest.approx(5000, rel=0.05)
    assert sum(each.kind.request.n == 4 for each in calls) == pytest.approx(2000, rel=0.1)
    assert sum(each.new_prompt for each in calls) == pytest.approx(5000, rel=0.05)


def test_the_search_finds_the_least_and_shows_its_neighbours(toy_bundle: Path) -> None:
    asked = planner(toy_bundle, rate=150, p99_s=0.1)
    made = asked.search(lambda _: None)
    enough = next(each.workers for each in made if each.kept)
    assert [each.workers for each in made] == [enough - 2, enough - 1, enough, enough + 1]
    assert [each.kept for each in made] == [False, False, True, True]


def test_more_workers_are_better(toy_bundle: Path) -> None:
    made = [planner(toy_bundle, rate=150, p99_s=0.1).forecast(workers) for workers in (2, 3, 4, 6, 9, 14, 21)]
    for figures in ([each.p50_s or math.inf for each in made], [each.p99_s or math.inf for each in made]):
        assert figures == sorted(figures, reverse=True)
    assert [each.refused for each in made] == sorted((each.refused for each in made), reverse=True)
    assert [each.rows for each in made] == sorted((each.rows for each in made), reverse=True)


@pytest.mark.parametrize("least", [1, 3, 20])
@pytest.mark.parametrize("guess", [20, 25, 40, 900])
@pytest.mark.parametrize("answer", [20, 21, 27, 300, 1000])
def test_the_search_finds_the_least_from_any_guess(least: int, guess: int, answer: int) -> None:
    tried: list[int] = []

    def kept(workers: int) -> bool:
        tried.append(workers)
        return workers >= answer

    assert find_least(kept, least, guess) == answer
    assert len(tried) == len(set(tried)) <= 24
    assert answer == least or answer - 1 in tried
    assert least <= min(tried) <= max(tried) <= 1000


def test_a_search_without_end_is_given_up() -> None:
    with pytest.raises(PlanError, match="More than 1000 workers"):
        find_least(lambda _: False, 5, 7)


def test_an_overloaded_fleet_refuses_and_does_not_keep_the_objective(toy_bundle: Path) -> None:
    made = planner(toy_bundle, rate=400, p99_s=10, requests=20_000).forecast(1)
    assert not made.kept
    assert made.refused > 0.1
    assert made.p99_s is None
    assert made.busy == pytest.approx(1, abs=0.01)


def test_the_least_number_of_workers_is_never_too_many(toy_bundle: Path) -> None:
    """With hours to wait, what is needed is what the work itself takes, and one worker fewer cannot keep up."""
    bundle = verify_bundle(toy_bundle)
    load = Load(kinds([(bundle.manifest, costs_of(bundle))], Mix()), 400, 20_000, 0.0, seed=3)
    assert load.least_workers == math.ceil(400 * (4 * 4 + 2) / 1000)
    overloaded = planner(toy_bundle, rate=400, p99_s=10, requests=20_000).forecast(load.least_workers - 1)
    assert not overloaded.kept
    assert overloaded.refused > 0


def test_an_objective_below_a_lone_request_is_impossible(toy_bundle: Path) -> None:
    with pytest.raises(PlanError, match=r"0\.01 s: 100% of the requests take longer even alone, up to 0\.046 s"):
        planner(toy_bundle, rate=1, p99_s=0.01).search(lambda _: None)


def test_a_task_that_the_model_lacks_is_named(toy_bundle: Path) -> None:
    manifest = verify_bundle(toy_bundle).manifest.model_copy(update={"tasks": ("text_to_image",)})
    with pytest.raises(PlanError, match="toy-digits has no task edit; it has text_to_image"):
        kinds([(manifest, CostTable({}))], Mix(tasks={"edit": 1}))
