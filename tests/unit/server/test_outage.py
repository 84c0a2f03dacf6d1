"""An outage in the log: once for each reason, however often it is met."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from server import outage as outages
from server.outage import Outage


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


def test_an_outage_lasts_from_its_first_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(outages.time, "monotonic", lambda: now[0])
    outage = Outage()
    assert outage.lasts_s == 0
    for now[0] in (103.0, 110.0):
        outage.goes_on("refused")
    assert outage.lasts_s == 7
    outage.is_over()
    assert outage.lasts_s == 0
