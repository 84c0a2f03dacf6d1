"""The goodput benchmark: every contender draws the same pictures, a wrong one is seen, the search ends right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engines.open import open_pipeline
from engines.pipeline import Pipeline
from tests.benchmarks.eager import EagerStudent
from tests.benchmarks.goodput import LADDER, climb
from tests.benchmarks.load import Call, Pixels, is_right, judge
from tests.benchmarks.page_goodput import goodput_section, over_litserve
from tests.benchmarks.random_bundle import TINY_UNET, RandomOptions, make_random_bundle
from tests.benchmarks.results import Goodput, Outcome, Pace, Point, Provenance
from tests.benchmarks.servers import servers
from tests.benchmarks.together import make_together
from tests.benchmarks.wishes import TASKS, Wish, answer, draw_pool
from tests.support.open_loop import Answer


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    options = RandomOptions(steps=(4, 1), unet=TINY_UNET, shared=True)
    bundle = make_random_bundle(tmp_path_factory.mktemp("bundle") / "random", options)
    return open_pipeline(bundle.path, rungs=(1, 8), warm=False)


@pytest.fixture(scope="module")
def drawn(pipeline: Pipeline) -> list[tuple[Wish, Pixels]]:
    pool = draw_pool(pipeline, seed=0, count=6)
    return list(zip(pool, make_together(pipeline, pool), strict=True))


@pytest.mark.long
def test_every_task_and_step_count_shares_one_graph(pipeline: Pipeline, drawn: list[tuple[Wish, Pixels]]) -> None:
    assert {(wish.task, wish.steps) for wish, _ in drawn} == {(task, n) for task in TASKS for n in (1, 4)}
    assert len({student.graph for student in pipeline.manifest.students}) == 1


@pytest.mark.long
def test_eager_diffusers_draws_the_same_pictures(pipeline: Pipeline, drawn: list[tuple[Wish, Pixels]]) -> None:
    student = EagerStudent(pipeline.bundle.path)
    for wish, expected in drawn:
        assert is_right(json.dumps(answer(student.make(wish))).encode(), expected), wish


@pytest.mark.long
def test_only_the_expected_picture_within_the_objective_counts(drawn: list[tuple[Wish, Pixels]]) -> None:
    (_, first), (_, second) = drawn[:2]
    calls = [Call(float(k), "/", "application/json", b"", first) for k in range(1, 6)]
    right, wrong = (json.dumps(answer(pixels)).encode() for pixels in (first, second))
    bodies = [(200, 0.1, right), (200, 9.0, right), (200, 0.1, wrong), (503, 0.1, b""), (0, 0.1, b"")]
    outcome = judge(
        calls, [Answer(status, 0.0, latency_s, body) for status, latency_s, body in bodies], objective_s=1.0
    )
    assert (outcome.within, outcome.wrong, outcome.rejected, outcome.failed) == (0.2, 1, 1, 1)
    assert outcome.goodput == pytest.approx(1 / 5)
    assert not is_right(b"no json", first)
    openai = {"data": [{"b64_json": answer(first)["image"]}]}
    assert is_right(json.dumps(openai).encode(), first)
    assert not is_right(json.dumps(openai).encode(), first[:-1])


def point(load: float, within: float, name: str = "ours", number: int = 0) -> Point:
    outcome = Outcome(
        offered=10 * load,
        goodput=10 * load * within,
        within=within,
        rejected=0,
        failed=0,
        wrong=0,
        p50_ms=1.0,
        p99_ms=2.0,
    )
    pace = Pace(lone_ms=1.0, images_per_s=10.0)
    return Point(contender=name, load=load, round=number, pace=pace, outcome=outcome)


def test_contenders_climb_in_turn_until_they_are_hopeless() -> None:
    within = {(1, 0.3): 0.4, (0, 0.4): 0.4}
    points = climb(2, LADDER, 1, lambda load: lambda k: point(load, within.get((k, load), 1.0), "ab"[k]))
    order = [(p.load, p.contender) for p in points]
    assert order == [(0.1, "b"), (0.1, "a"), (0.3, "a"), (0.3, "b"), (0.4, "a")]


def shares(name: str, within: dict[float, tuple[float, ...]]) -> list[Point]:
    return [point(load, share, name, k) for load, each in within.items() for k, share in enumerate(each)]


def test_the_rate_kept_is_read_between_the_rates_offered() -> None:
    points = shares("a", {0.3: (0.9, 1.0, 1.0), 0.4: (1.0, 1.0, 0.6), 0.5: (1.0, 0.96, 0.9), 0.6: (1.0,)})
    result = compared(("a",), points, rounds=3)
    assert result.shares("a", range(3)) == {0.3: 1.0, 0.4: 1.0, 0.5: 0.96, 0.6: 0.0}
    assert result.rate_kept("a") == pytest.approx(0.425)
    assert result.sustained("a") == pytest.approx(0.99 * 4.25)
    assert result.rate_kept("a", [0, 0, 1]) == pytest.approx(0.0)
    assert compared(("a",), points, rounds=9).rate_kept("a") == 0.0
    assert compared(("a",), shares("a", {0.3: (1.0,), 0.4: (1.0,)}), rounds=1).rate_kept("a") == 0.4


def test_a_ratio_is_given_with_its_spread() -> None:
    points = shares("a", {0.2: (1.0, 1.0, 1.0), 0.4: (1.0, 1.0, 0.0), 0.6: (0.0, 0.0)})
    points += shares("b", {0.2: (1.0, 1.0, 1.0), 0.4: (0.0, 0.0, 0.0)})
    result = compared(("a", "b"), points, rounds=3)
    ratio, low, high = result.over("a", "b")
    assert low == pytest.approx(1.0, abs=0.01)
    assert ratio == high == pytest.approx(2.0, abs=0.05)


def test_the_page_gives_the_ratio_over_the_rates_kept() -> None:
    names = tuple(server.name for server in servers(Path("a"), (8, 10.0)))
    loads = dict(zip(names, (0.8, 0.6, 0.4, 0.2), strict=True))
    points = [p for name, load in loads.items() for p in (point(load, 1.0, name), point(load + 0.1, 0.0, name))]
    result = compared(names, points, rounds=1)
    assert over_litserve(result) == pytest.approx(0.801 / 0.401)
    page = goodput_section(result)
    assert "| LitServe, batch 8, 10 ms | 3.97 | 2.00 [2.00, 2.00] | 0.40 | 1 | 2 |" in page
    assert "| LitServe, batch 8, 10 ms |  |  | 100.0 (100) | 0.0 (0) |  |  |  |  |" in page


def compared(contenders: tuple[str, ...], points: list[Point], rounds: int) -> Goodput:
    return Goodput(
        provenance=Provenance(machine="", versions={}, seed=0, command="go", date="", others_cpu=0.0),
        bundle="random-shared",
        engine="an engine",
        steps=(1, 4),
        one_graph=True,
        tasks=TASKS,
        rounds=rounds,
        seconds=1.0,
        objective_of_lone=5.0,
        enough_within=0.99,
        contenders=contenders,
        screened=(),
        points=tuple(points),
    )
