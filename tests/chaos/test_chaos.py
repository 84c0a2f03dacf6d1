"""A short run of the harness, and that it would notice. The long ones: ``python -m tests.chaos``."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import cancels
from tests.chaos.harness import Plan, run
from tests.chaos.plants import PLANTS
from tests.load.rolling import Restarts, restart_all

SHORT = Plan(240, 10, workers=2, worker_kills=3, api_kills=1, redis_kills=1, freezes=1, poison=1)


def test_nothing_is_lost_doubled_or_blamed(toy_bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    verdict = run(SHORT, toy_bundle, log)
    assert not verdict.faults, f"{verdict.examples}\n{log.read_text()[-5000:]}"


def test_a_redis_cut_off_short_of_memory_and_out_of_disk_loses_nothing(toy_bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    verdict = run(Plan(120, 8, workers=2, cuts=1, memory_shortages=1, full_disks=1), toy_bundle, log)
    assert not verdict.faults, f"{verdict.examples}\n{log.read_text()[-5000:]}"


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(Plan(60, 3, apis=1, workers=1, plant="no_idempotency"), id="no_idempotency"),
        pytest.param(Plan(60, 4, apis=1, workers=1, plant="early_ack"), id="early_ack"),
    ],
)
def test_a_planted_bug_is_noticed(plan: Plan, toy_bundle: Path, tmp_path: Path) -> None:
    verdict = run(plan, toy_bundle, tmp_path / "log")
    assert verdict.sound, f"not seen as {PLANTS[plan.plant].seen_as}: {verdict.faults}"


@pytest.mark.long
def test_rolling_restarts_are_not_noticed(toy_bundle: Path, tmp_path: Path) -> None:
    noticed = restart_all(Restarts(apis=2, workers=2, jobs=120, seconds=8), toy_bundle, tmp_path / "log")
    assert noticed.statuses == [0] * 4
    assert not noticed.errors
    assert noticed.unmade == 0


def test_a_request_given_up_runs_one_further_step_at_most_and_harms_nobody(toy_bundle: Path) -> None:
    aftermath = cancels.run(cancels.Storm(cancels=200, step_s=0.012, redis=False), toy_bundle)
    assert not aftermath.faults
    assert aftermath.companions >= len(cancels.COMPANIONS)


def test_a_worker_that_does_not_listen_is_noticed(toy_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.settling.Settling.stop", lambda self, tokens: None)
    aftermath = cancels.run(cancels.Storm(cancels=30, step_s=0.012, redis=False), toy_bundle)
    assert any("more than one further step" in fault for fault in aftermath.faults), aftermath.faults
