"""Two workers under open-loop load, next to what the capacity planner says of them.

The plan takes the step times they had. What a lone request takes beyond its plan (HTTP, the job store, processes
that tell each other) is added to it.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx

from engines.bundle import verify_bundle
from engines.cost import CostTable
from server.capacity.plan import Forecast, Load, Planner, admission_of
from server.capacity.question import Mix
from server.capacity.sources import file_ms
from server.capacity.traffic import kinds
from server.capacity.worker import WorkerLimits
from server.settings import Settings
from tests.chaos.fleet import Fleet
from tests.chaos.node import ROWS
from tests.load.overload import BODY, CLIENTS, PATH, capacity
from tests.load.verdict import Finding, quantile, report
from tests.support.fake_engines import RUNGS
from tests.support.open_loop import Departure, arrivals, post, send

WORKERS = 2
LOADS = (0.5, 0.8)
"""Of what the workers make under full load."""

CAPACITY_S, LONE = 10.0, 15
QUICK_MS = 0.2
"""What the engines take for all but steps, through which they sleep."""

MOST_APART = 0.25

_STEPS = re.compile(r'halfstep_step_seconds_(sum|count)\{.*rung="(\d+)".*\} (\S+)')


def planned(seconds: float, bundle: Path, log: Path) -> bool:
    """Measure and print; whether plan and measurement are near. seconds: of each load."""
    with Fleet(bundle, 1, WORKERS, "", log, {"HALFSTEP_MAX_QUEUE_S": "30"}) as fleet:
        fleet.wait_ready()
        host, workers = fleet.apis[0].url.removeprefix("http://"), [node.url for node in fleet.workers]
        wire = post(host, PATH, "application/json", BODY)
        most = asyncio.run(capacity(host, wire, CAPACITY_S, clients=CLIENTS * WORKERS))
        beyond_s = _beyond_plan_s(host, wire, bundle, workers)
        findings = []
        for load in LOADS:
            before, rate = _step_times(workers), load * most
            departures = [Departure(at_s, wire) for at_s in arrivals(rate, seconds, seed=1)]
            answers = asyncio.run(send(host, departures))
            made = [answer.latency_s for answer in answers if answer.status == 200]
            forecast = _planner(rate, bundle, _step_ms(before, _step_times(workers))).forecast(WORKERS)
            missing = len(answers) - len(made)
            findings.append(Finding(f"{rate:.1f} requests/s: not made", "0", str(missing), missing == 0))
            findings += _compared(made, forecast, beyond_s)
    return report(
        f"{WORKERS} workers, {seconds:.0f} s each, engines that sleep; a lone request takes "
        f"{1000 * beyond_s:.0f} ms beyond its plan, which is added",
        findings,
    )


def _beyond_plan_s(host: str, wire: bytes, bundle: Path, workers: Sequence[str]) -> float:
    """What a lone request takes, at the median, beyond what the plan of one says."""
    before = _step_times(workers)
    lone = [asyncio.run(send(host, [Departure(0.0, wire)]))[0].latency_s for _ in range(LONE)]
    planner = _planner(1.0, bundle, _step_ms(before, _step_times(workers)))
    return quantile(lone, 0.5) - planner.alone_s(planner.kinds[0])


def _compared(made: Sequence[float], forecast: Forecast, beyond_s: float) -> list[Finding]:
    found = []
    for name, expected_s, q in (("p50", forecast.p50_s, 0.5), ("p99", forecast.p99_s, 0.99)):
        wanted_s = (math.inf if expected_s is None else expected_s) + beyond_s
        ratio = quantile(made, q) / wanted_s
        measured = f"{ratio:.2f} × {1000 * wanted_s:.0f} ms"
        found.append(Finding(name, f"1 ± {MOST_APART:g}", measured, abs(ratio - 1) <= MOST_APART))
    return found


def _step_times(workers: Sequence[str]) -> Counter[tuple[str, int]]:
    """Seconds and steps of all workers by rung, as (``sum`` or ``count``, rung)."""
    times: Counter[tuple[str, int]] = Counter()
    for url in workers:
        for kind, rung, value in _STEPS.findall(httpx.get(f"{url}/metrics", timeout=10).text):
            times[kind, int(rung)] += float(value)  # type: ignore[assignment]
    return times


def _step_ms(before: Counter[tuple[str, int]], after: Counter[tuple[str, int]]) -> Mapping[int, float]:
    """Mean of a step at each rung; of a rung that was not run, that of the nearest that was."""
    run = {rung: after["count", rung] - before["count", rung] for rung in RUNGS}
    means = {r: 1000 * (after["sum", r] - before["sum", r]) / steps for r, steps in run.items() if steps}
    return {rung: means[min(means, key=lambda known: abs(known - rung))] for rung in RUNGS}


def _planner(rate: float, bundle: Path, step_ms: Mapping[int, float]) -> Planner:
    verified = verify_bundle(bundle)
    quick = dict.fromkeys(RUNGS, QUICK_MS)
    graphs = verified.manifest.graphs
    table = CostTable({graph: step_ms if graph.startswith("step") else quick for graph in graphs})
    asked = kinds([(verified.manifest, table)], Mix(steps={8: 1}, images={4: 1}))
    limits = WorkerLimits(ROWS, Settings.model_fields["encode_threads"].default, file_ms(asked) / 1000)
    admission = admission_of([(verified, table)], asked, 30.0, 2048)
    return Planner(Load(asked, rate, 20_000, 0.0, seed=0), 1.0, limits, admission)
