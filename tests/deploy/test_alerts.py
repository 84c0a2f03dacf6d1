"""The alerts, evaluated by Prometheus itself over made-up series: what rings, and what does not."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.sources import ROOT

CASES = Path(__file__).parent / "prometheus/alerts.test.yaml"
PROMTOOL = shutil.which("promtool")
ALERTS = [
    rule
    for group in yaml.safe_load((ROOT / "docker/prometheus/rules/alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
UNITS = {"s": 1, "m": 60, "h": 3600}


@pytest.mark.skipif(PROMTOOL is None, reason="promtool (Debian: prometheus) is not installed")
def test_alerts_ring_when_they_should() -> None:
    assert PROMTOOL is not None
    told = subprocess.run([PROMTOOL, "test", "rules", str(CASES)], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
    assert "SUCCESS" in told.stdout


def test_every_alert_rings_in_some_case() -> None:
    cases = yaml.safe_load(CASES.read_text())["tests"]
    asked = [each for case in cases for each in case["alert_rule_test"]]
    assert {each["alertname"] for each in asked if each["exp_alerts"]} == {rule["alert"] for rule in ALERTS}


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: str(rule["alert"]))
def test_no_alert_waits_longer_than_what_it_saw_stays_in_sight(rule: dict[str, str]) -> None:
    """One event keeps ``increase(…[5m]) > 0`` true for less than 5 minutes: ``for: 5m`` never ends then."""
    if "increase(" not in rule["expr"]:
        return
    ranges = [int(n) * UNITS[unit] for n, unit in re.findall(r"\[(\d+)([smh])\]", rule["expr"])]
    (count, unit) = re.fullmatch(r"(\d+)([smh])", rule["for"]).groups()  # type: ignore[union-attr]
    assert int(count) * UNITS[unit] < min(ranges)
