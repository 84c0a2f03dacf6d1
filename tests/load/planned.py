"""Two workers under open-loop load, next to what the capacity planner says of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from engines.bundle import verify_bundle
from engines.cost import CostTable
from server.capacity.plan import Forecast, Load, Planner, admission_of
from server.capacity.question import Mix
from server.capacity.sources import file_ms
from server.capacity.traffic import kinds
from server.capacity.worker import WorkerLimits
from server.settings import Settings
from tests.chaos.engine import STEP_S
from tests.chaos.node import ROWS
from tests.load.overload import BODY, PATH, serving
from tests.load.verdict import Finding, quantile, report
from tests.support.fake_engines import RUNGS
from tests.support.open_loop import Departure, arrivals, post, send

WORKERS = 2
LOADS = (0.5, 0.8)
"""Of what two workers make in their best batches."""

QUICK_MS = 0.2
"""What the engines take for all but steps, through which they sleep."""

MOST_APART = 0.25


def planned(seconds: float, bundle: Path, log: Path) -> bool:
    """Measure and print; whether plan and measurement are near. seconds: of each load."""
    with serving("redis", bundle, log, workers=WORKERS, HALFSTEP_MAX_QUEUE_S="30") as server:
        findings = [each for load in LOADS for each in _findings(load, seconds, bundle, server.host)]
    return report(f"{WORKERS} workers, {seconds:.0f} s each, engines that sleep; latency over the plan's", findings)


def _findings(load: float, seconds: float, bundle: Path, host: str) -> list[Finding]:
    rate, forecast = _forecast(load, bundle)
    wire = post(host, PATH, "application/json", BODY)
    answers = asyncio.run(send(host, [Departure(at_s, wire) for at_s in arrivals(rate, seconds, seed=1)]))
    made = [answer.latency_s for answer in answers if answer.status == 200]
    found = [
        Finding(f"{rate:.1f} requests/s: not made", "0", str(len(answers) - len(made)), len(answers) == len(made))
    ]
    for name, expected_s, q in (("p50", forecast.p50_s, 0.5), ("p99", forecast.p99_s, 0.99)):
        ratio = quantile(made, q) / (expected_s or 1e-9)
        measured = f"{ratio:.2f} × {1000 * (expected_s or 0):.0f} ms"
        found.append(Finding(name, f"1 ± {MOST_APART:g}", measured, abs(ratio - 1) <= MOST_APART))
    return found


def _forecast(load: float, bundle: Path) -> tuple[float, Forecast]:
    """Requests a second, and what the plan says of them."""
    verified = verify_bundle(bundle)
    table = CostTable(
        {
            graph: dict.fromkeys(RUNGS, 1000 * STEP_S if graph.startswith("step") else QUICK_MS)
            for graph in verified.manifest.graphs
        }
    )
    (kind,) = asked = kinds([(verified.manifest, table)], Mix(steps={8: 1}, images={4: 1}))
    rate = load * WORKERS / kind.least_s
    limits = WorkerLimits(ROWS, Settings.model_fields["encode_threads"].default, file_ms(asked) / 1000)
    admission = admission_of([(verified, table)], asked, 30.0, 2048)
    return rate, Planner(Load(asked, rate, 20_000, 0.0, seed=0), 1.0, limits, admission).forecast(WORKERS)
