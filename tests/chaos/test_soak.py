"""The verdict of a soak on what was sampled; the soak itself: ``python -m tests.chaos soak``."""

from __future__ import annotations

import pytest

from tests.chaos.soak import Soak

HOUR_S = 3600.0


def sampled(name: str, per_hour: float, warm_up: float = 0.0) -> Soak:
    """Grows steadily, and at once by as much as a start does."""
    times = range(0, int(HOUR_S), 10)
    values = [(float(t), 100 + per_hour * t / HOUR_S - (warm_up if t < 600 else 0.0)) for t in times]
    return Soak(HOUR_S, {name: values})


@pytest.mark.parametrize(
    ("name", "per_hour", "grew"),
    [
        ("api MB", 0.0, False),
        ("api MB", 2.0, False),
        ("api MB", 6.0, True),
        ("api descriptors", 5.0, False),
        ("api descriptors", 60.0, True),
        ("engine threads", 10.0, True),
        ("redis keys", 1000.0, True),
    ],
)
def test_growth_is_told_from_jitter(name: str, per_hour: float, grew: bool) -> None:
    assert bool(sampled(name, per_hour).faults) is grew


def test_what_a_process_takes_while_it_warms_up_is_no_growth() -> None:
    assert not sampled("api MB", 0.0, warm_up=50.0).faults


def test_answers_that_no_request_should_get_are_faults() -> None:
    soak = sampled("api MB", 0.0)
    soak.answers.update({200: 5, 503: 2, 500: 1, 0: 3})
    assert soak.faults == ["answers {500: 1, 0: 3}"]
