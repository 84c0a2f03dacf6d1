"""The dashboard and the rules ask only for metrics and labels there are, and no metric is forgotten."""

from __future__ import annotations

import json
import re
from functools import cache

import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram

from server.metrics import Metrics, StoreTotals
from tests.deploy.sources import ROOT

DASHBOARD = ROOT / "docker/grafana/dashboards/halfstep.json"
RULES = sorted((ROOT / "docker/prometheus/rules").glob("*.yaml"))
SCRAPED = {"instance", "job"}
"""Labels that Prometheus itself gives every series."""

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
NAME = r"(?:halfstep|process)[a-z0-9_:]+"


def panels() -> list[dict[str, object]]:
    found: list[dict[str, object]] = [p for p in json.loads(DASHBOARD.read_text())["panels"] if p["type"] != "row"]
    return found


def targets() -> list[tuple[str, str]]:
    """(expression, legend) of every line of every panel."""
    lines = [target for panel in panels() for target in panel["targets"]]  # type: ignore[attr-defined]
    return [(line["expr"], line["legendFormat"]) for line in lines]


def rules() -> list[dict[str, str]]:
    return [
        rule for file in RULES for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]
    ]


@cache
def families() -> dict[str, set[str]]:
    """Labels of every metric by its name, the suffix of counters included."""
    metrics = [m for m in vars(Metrics()).values() if isinstance(m, Counter | Gauge | Histogram)]
    named = {
        m.describe()[0].name + ("_total" if isinstance(m, Counter) else ""): set(m._labelnames) for m in metrics
    }
    totals = {f"{family.name}_total": set(family._labelnames) for family in StoreTotals().collect()}
    return named | totals | {"process_resident_memory_bytes": set()}


@cache
def series() -> dict[str, set[str]]:
    """Labels of everything an expression may name: samples, and what the rules record."""
    histograms = {m.describe()[0].name for m in vars(Metrics()).values() if isinstance(m, Histogram)}
    found: dict[str, set[str]] = {"process_start_time_seconds": set()}
    for name, labels in families().items():
        if name in histograms:
            found |= {f"{name}_sum": labels, f"{name}_count": labels, f"{name}_bucket": labels | {"le"}}
        else:
            found[name] = labels
    for rule in (r for r in rules() if "record" in r):
        found[rule["record"]] = grouped(rule["expr"]) - {"le"}
    return found


def grouped(expression: str) -> set[str]:
    return {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}


def unknown(expression: str, legend: str = "") -> set[str]:
    """Metrics and labels there are not; a label must belong to the very metric it selects."""
    missing = set()
    labels: set[str] = set(SCRAPED)
    bare = re.sub(r"by \([^)]*\)", "", expression)
    for name, selector in re.findall(rf"({NAME})(?:\{{([^}}]*)\}})?", bare):
        if name not in series():
            missing.add(name)
            continue
        labels |= series()[name]
        chosen = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
        missing |= {f"{name}{{{label}}}" for label in chosen - series()[name] - SCRAPED}
    shown = set(re.findall(r"\{\{(\w+)\}\}", legend))
    left = grouped(expression) or (set() if re.search(r"\b(sum|max|count)\s*\(", expression) else labels)
    return missing | (grouped(expression) - labels) | (shown - left)


@pytest.mark.parametrize(("expression", "legend"), targets(), ids=lambda text: text[:60])
def test_each_line_asks_for_what_there_is(expression: str, legend: str) -> None:
    assert not unknown(expression, legend)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.get("record") or rule["alert"])
def test_each_rule_asks_for_what_there_is(rule: dict[str, str]) -> None:
    assert not unknown(rule["expr"])
    assert rule["expr"].count("(") == rule["expr"].count(")")


def test_every_metric_is_on_the_dashboard() -> None:
    recorded = {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}
    asked = " ".join(expression for expression, _ in targets())
    asked += " " + " ".join(expression for record, expression in recorded.items() if record in asked)
    assert {name for name in families() if not re.search(rf"\b{name}(_bucket|_sum)?\b", asked)} == set()


def test_every_record_is_used() -> None:
    asked = " ".join([expression for expression, _ in targets()] + [rule["expr"] for rule in rules()])
    assert [rule["record"] for rule in rules() if "record" in rule and rule["record"] not in asked] == []


def test_the_stores_figures_are_never_summed_over_processes() -> None:
    names = [f"{family.name}_total" for family in StoreTotals().collect()]
    expressions = [expression for expression, _ in targets()] + [rule["expr"] for rule in rules()]
    summed = [e for e in expressions for name in names if name in e and "sum" in e]
    assert not summed


def test_panels_are_whole_and_do_not_overlap() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in panels():
        assert panel["title"]
        assert panel["description"]
        assert panel["datasource"] == DATASOURCE
        place: dict[str, int] = panel["gridPos"]  # type: ignore[assignment]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & own
        assert all(x < 24 for x, _ in own)
        cells |= own


@pytest.mark.parametrize(
    ("expression", "legend"),
    [
        ("rate(halfstep_request_total[5m])", ""),
        ('rate(halfstep_requests_total{state="failed"}[5m])', ""),
        ("sum by (prompt) (rate(halfstep_requests_total[5m]))", ""),
        ("max(halfstep_queued_seconds)", "{{model}}"),
        ("halfstep:nothing:rate5m", ""),
        ("rate(halfstep_request_seconds[5m])", ""),
    ],
)
def test_a_planted_error_is_seen(expression: str, legend: str) -> None:
    assert unknown(expression, legend)
