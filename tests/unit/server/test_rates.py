"""Rates and quotas: what a refusal says about when to come again."""

from __future__ import annotations

import math

import pytest

from server.rates import Rates

pytestmark = pytest.mark.anyio

RATE = "10/minute"


class Clock:
    """Seconds since 1970, at the start of a minute, that the counters read."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.time", clock)
    return clock


@pytest.mark.parametrize("wanted", [4, 10])
@pytest.mark.parametrize(("before", "later_s", "now"), [(0, 90, 10), (10, 60, 0), (6, 90, 7), (9, 75, 2)])
async def test_a_refusal_says_when_so_much_is_free(
    clock: Clock, before: int, later_s: float, now: int, wanted: int
) -> None:
    rates = Rates()
    await rates.spend(RATE, before, "quota")
    clock.now += later_s
    await rates.spend(RATE, now, "quota")
    wait_s = await rates.wait_s(RATE, wanted, "quota")
    assert wait_s is not None
    clock.now += wait_s - 0.01
    assert await rates.spend(RATE, wanted, "quota") is not None, "not before"
    clock.now += 0.01
    assert await rates.spend(RATE, wanted, "quota") is None


async def test_a_look_takes_nothing(clock: Clock) -> None:
    rates = Rates()
    for _ in range(3):
        assert await rates.wait_s(RATE, 10, "quota") is None
    assert await rates.spend(RATE, 10, "quota") is None
    assert await rates.wait_s(RATE, 11, "quota") == math.inf
    assert await rates.wait_s(None, 11, "quota") is None
