"""What more workers bring: requests made a second by one API and one, two, three of them over a Redis."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.load.overload import BODY, CLIENTS, PATH, capacity, serving
from tests.load.verdict import Finding, report
from tests.support.open_loop import post

WORKERS = (1, 2, 3)
LEAST_SHARE = 0.8
"""Of so many times one worker's, while the engines sleep and no core is used up."""


def scale(seconds: float, bundle: Path, log: Path) -> bool:
    """Measure and print; whether each worker brought its share. seconds: of full load for each."""
    made = [_made(count, seconds, bundle, log) for count in WORKERS]
    findings = [
        Finding(
            f"{count} workers" if count > 1 else "one worker",
            f"≥ {LEAST_SHARE * count * made[0]:.1f}" if count > 1 else "",
            f"{rate:.1f}",
            rate >= LEAST_SHARE * count * made[0] or count == 1,
        )
        for count, rate in zip(WORKERS, made, strict=True)
    ]
    return report(f"requests a second of 4 images, {seconds:.0f} s each, engines that sleep", findings)


def _made(workers: int, seconds: float, bundle: Path, log: Path) -> float:
    with serving("redis", bundle, log, workers=workers, HALFSTEP_MAX_QUEUE_S="30") as server:
        wire = post(server.host, PATH, "application/json", BODY)
        return asyncio.run(capacity(server.host, wire, seconds, clients=CLIENTS * workers))
