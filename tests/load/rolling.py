"""Every process of a fleet ended by SIGTERM and started again, in turn, under load: what its clients notice."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from tests.chaos.fleet import Fleet, Node
from tests.chaos.ledger import Ledger
from tests.load.verdict import Finding, report
from tests.support.serving import until

START_S, END_S = 120, 120
MOST_EXIT_S = 30.0


@dataclass(frozen=True)
class Restarts:
    """jobs: spread over that many seconds; rounds: how often every process is ended."""

    apis: int
    workers: int
    jobs: int
    seconds: float
    rounds: int = 1


@dataclass(frozen=True)
class Noticed:
    """statuses, exits_s: of what ended; errors: what clients were told; unmade: jobs without images."""

    statuses: list[int]
    exits_s: list[float]
    errors: list[str]
    unmade: int


def restart_all(plan: Restarts, bundle: Path, log: Path) -> Noticed:
    """A worker and an API end together; the next ones when both are ready again."""
    with Fleet(bundle, plan.apis, plan.workers, "", log) as fleet:
        fleet.wait_ready()
        ledger = Ledger([node.url for node in fleet.apis], plan.jobs, 0, random.Random(1))
        ends = asyncio.run(_roll(plan, fleet, ledger))
    return Noticed(
        statuses=[status for status, _ in ends],
        exits_s=[seconds for _, seconds in ends],
        errors=[error for entry in ledger.entries for error in entry.errors],
        unmade=sum(entry.status != "succeeded" for entry in ledger.entries),
    )


def rolling(plan: Restarts, bundle: Path, log: Path) -> bool:
    """Measure and print; whether nobody noticed."""
    noticed = restart_all(plan, bundle, log)
    slowest, bad = max(noticed.exits_s), sum(status != 0 for status in noticed.statuses)
    findings = [
        Finding("client errors", "0", str(len(noticed.errors)), not noticed.errors),
        Finding("jobs not made", "0", str(noticed.unmade), noticed.unmade == 0),
        Finding("processes that ended badly", "0", str(bad), bad == 0),
        Finding("slowest end", f"≤ {MOST_EXIT_S:.0f} s", f"{slowest:.1f} s", slowest <= MOST_EXIT_S),
    ]
    title = f"{plan.apis} APIs and {plan.workers} workers, each ended {plan.rounds} times; {plan.jobs} jobs"
    return report(title, findings)


async def _roll(plan: Restarts, fleet: Fleet, ledger: Ledger) -> list[tuple[int, float]]:
    working = asyncio.create_task(ledger.run(plan.seconds))
    ends: list[tuple[int, float]] = []
    for _ in range(plan.rounds):
        for pair in zip_longest(fleet.workers, fleet.apis):
            nodes = [node for node in pair if node is not None]
            ends += await asyncio.gather(*(asyncio.to_thread(_end, node) for node in nodes))
            for node in nodes:
                node.start()
            for node in nodes:
                await asyncio.to_thread(until, lambda node=node: node.ready, "it is ready again", START_S)
    await asyncio.wait_for(working, plan.seconds + END_S)
    return ends


def _end(node: Node) -> tuple[int, float]:
    begun = time.monotonic()
    return node.terminate(), time.monotonic() - begun
