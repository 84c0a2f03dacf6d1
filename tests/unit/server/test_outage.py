"""An outage in the log: once for each reason, however often it is met."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from server import outage as outages
from server.outage import ANEW_S, Outage


def test_each_reason_of_an_outage_is_said_once_and_its_end() -> None:
    outage = Outage()
    with capture_logs() as logs:
        outage.is_over()
        for _ in range(2):
            for reason in ("refused", "loading", "refused"):
                outage.goes_on(reason, call="claim")
            outage.is_over()
            outage.is_over()
    told = [(line["event"], line.get("error"), line.get("call")) for line in logs]
    assert told == 2 * [
        ("store_away", "refused", "claim"),
        ("store_away", "loading", "claim"),
        ("store_back", None, None),
    ]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds, moved by hand."""
    moved = [100.0]
    monkeypatch.setattr(outages.time, "monotonic", lambda: moved[0])
    return moved


def test_an_outage_lasts_from_its_first_failure(now: list[float]) -> None:
    outage = Outage()
    assert outage.lasts_s == 0
    for now[0] in (103.0, 110.0):
        outage.goes_on("refused")
    assert outage.lasts_s == 7
    outage.is_over()
    assert outage.lasts_s == 0


def test_calls_that_fail_side_by_side_and_in_turn_are_of_one_outage(now: list[float]) -> None:
    """What comes late does not wait it out again, and what waits ends, however long a call takes."""
    outage = Outage()
    for asked, now[0] in ((90.0, 100.0), (99.0, 110.0), (169.0, 170.0), (170.5, 300.0), (300.5, 430.0)):
        outage.goes_on("refused", begun_s=asked)
    assert outage.lasts_s == 330


def test_a_failure_long_after_the_last_one_is_waited_for_anew_and_not_told_anew(now: list[float]) -> None:
    outage = Outage()
    with capture_logs() as logs:
        for now[0] in (100.0, 131.0, 131.0 + ANEW_S):
            outage.goes_on("refused")
        assert outage.lasts_s == 0
        now[0] += 31
        outage.goes_on("refused")
        assert outage.lasts_s == 31
        outage.is_over()
    assert [line["event"] for line in logs] == ["store_away", "store_back"]
