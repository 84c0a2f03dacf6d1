"""Isolation of failures, the embedding cache, where previews fall, and how long a job was where."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.errors import RequestError
from server.images import write_png
from server.jobs import Job, Lease
from server.request import DenoiseRequest
from server.stages import Conditions, failure_of, isolate
from server.work import Work, preview_steps
from tests.support.fake_engines import Bench
from tests.support.pictures import photo


def halves(items: Sequence[int]) -> list[int]:
    if any(item % 2 for item in items):
        raise ValueError("odd")
    return [item // 2 for item in items]


def test_all_go_together_when_nothing_fails() -> None:
    assert isolate([2, 4, 6], halves) == [1, 2, 3]


@pytest.mark.parametrize("position", range(4))
def test_a_culprit_fails_alone_wherever_it_stands(position: int) -> None:
    items = [2, 4, 6, 8]
    items[position] = 3
    results = isolate(items, halves)
    assert isinstance(results.pop(position), ValueError)
    items.pop(position)
    assert results == [item // 2 for item in items]


@pytest.mark.parametrize("bound", ["max_entries", "max_bytes"])
def test_conditions_are_computed_once_and_the_oldest_dropped(toy_bundle: Path, bound: str) -> None:
    pipeline = Bench(toy_bundle).pipeline
    asked: list[Sequence[str]] = []
    original = pipeline.condition

    def counting(prompts: Sequence[str]) -> np.ndarray:
        asked.append(list(prompts))
        return original(prompts)

    pipeline.condition = counting  # type: ignore[method-assign]
    each = {"max_entries": 1, "max_bytes": original(["one"])[0].nbytes}
    conditions = Conditions(pipeline, **{bound: 2 * each[bound]})
    found = conditions.get(["one", "two", "one"])
    conditions.get(["two", "one"])
    conditions.get(["three"])
    conditions.get(["two"])
    assert asked == [["one", "two"], ["three"], ["two"]]
    assert isinstance(found["two"], np.ndarray)
    assert found["two"].argmax() == 2


def test_a_condition_keeps_no_batch_in_memory(toy_bundle: Path) -> None:
    for condition in Conditions(Bench(toy_bundle).pipeline).get(["one", "two"]).values():
        assert isinstance(condition, np.ndarray)
        assert condition.base is None


def test_an_unknown_prompt_fails_alone(toy_bundle: Path) -> None:
    found = Conditions(Bench(toy_bundle).pipeline).get(["one", "cat"])
    assert isinstance(found["one"], np.ndarray)
    assert isinstance(found["cat"], RequestError)
    assert failure_of(found["cat"]).code == "unknown_prompt"


def test_a_client_is_not_told_what_an_engine_said() -> None:
    assert "secret" not in failure_of(RuntimeError("secret")).message


@pytest.mark.parametrize(
    ("steps", "partial", "expected"),
    [(4, 3, (1, 2, 3)), (8, 3, (2, 4, 6)), (8, 1, (4,)), (2, 3, (1,)), (1, 3, ()), (8, 0, ())],
)
def test_previews_are_spread_over_the_steps(steps: int, partial: int, expected: tuple[int, ...]) -> None:
    assert preview_steps(steps, partial) == expected


def work(queued_ms: float = 0.0, arrived_s: float = 0.0, **fields: Any) -> Work:
    asked = {"model": "m", "prompt": "p", "seed": 1, "guidance_scale": 2.0, "steps": 4, "width": 64, "height": 64}
    job = Job(id="j", request=DenoiseRequest.model_validate(asked | fields), cost_s=0.0)
    return Work(Lease(job=job, worker="w", attempt=1, queued_ms=queued_ms), arrived_s)


def test_previews_of_an_inverted_image_are_of_its_drawing() -> None:
    inverted = {"task": "edit", "image": write_png(photo()), "mode": "invert", "source_prompt": "q"}
    assert work(partial_images=3).preview_at == (1, 2, 3)
    assert work(partial_images=3, encoder_steps=8, **inverted).preview_at == (9, 10, 11)


def test_a_job_has_waited_since_its_acceptance() -> None:
    waited = work(queued_ms=500.0, arrived_s=10.0)
    waited.started_s = 10.25
    assert waited.queue_ms == 750.0


def test_a_stage_lasts_from_its_first_begin_to_its_last_end() -> None:
    stepped = work()
    for begin_s in (1.0, 3.0, 5.0):
        stepped.ran("steps", begin_s, begin_s + 1)
    assert stepped.spans == {"steps": (1.0, 6.0)}
