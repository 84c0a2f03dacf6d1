"""One tenant at a hundred times another's load: what the other notices of it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.load.overload import PATH, Server, serving
from tests.load.verdict import Finding, quantile, report
from tests.support.keys import write_key_file
from tests.support.open_loop import Answer, Departure, arrivals, post, send

BODY = json.dumps({"prompt": "one", "steps": 8, "seed": 1}).encode()
RATE, TIMES = 2.0, 100
"""Requests a second of the quiet tenant, and how many times more the other sends."""

ROWS = "10"
"""Images in the making: about one batch of the engine's largest, so that a newcomer soon has its turn."""

QUEUE_S = "10"
"""Predicted seconds that may wait; half of it is a tenant's, so the quiet one's bursts fit, as by default."""

MOST_P95 = 2.0


def fairness(store: str, seconds: float, bundle: Path, log: Path) -> bool:
    """Measure and print; whether the targets were met. seconds: of each of the two loads."""
    keys_file = log.with_name("keys.json")
    keys = write_key_file(keys_file)
    settings = {"HALFSTEP_API_KEYS": str(keys_file), "HALFSTEP_MAX_ROWS": ROWS, "HALFSTEP_MAX_QUEUE_S": QUEUE_S}
    with serving(store, bundle, log, **settings) as server:
        return asyncio.run(_measure(server, store, seconds, keys))


async def _measure(server: Server, store: str, seconds: float, keys: dict[str, str]) -> bool:
    alone = await send(server.host, _load(server, keys["b"], RATE, seconds, 1))
    noisy, quiet = await asyncio.gather(
        send(server.host, _load(server, keys["a"], TIMES * RATE, seconds, 2)),
        send(server.host, _load(server, keys["b"], RATE, seconds, 3)),
    )
    ratio = _p95(quiet) / _p95(alone)
    missed = Counter(answer.status for answer in (*alone, *quiet) if answer.status != 200)
    made = sum(answer.status == 200 for answer in noisy) / len(noisy)
    findings = [
        Finding("the quiet tenant's p95 over alone", f"≤ {MOST_P95:g}", f"{ratio:.2f}", ratio <= MOST_P95),
        Finding("its requests that were not answered", "0", _by_status(missed), not missed),
        Finding("the other is held back", "< 100 % made", f"{100 * made:.0f} %", made < 1),
    ]
    title = f"{store}: {RATE:g} requests/s beside {TIMES * RATE:g}, {seconds:.0f} s; p95 alone"
    return report(f"{title} {1000 * _p95(alone):.0f} ms, beside {1000 * _p95(quiet):.0f} ms", findings)


def _load(server: Server, key: str, rate: float, seconds: float, seed: int) -> list[Departure]:
    wire = post(server.host, PATH, "application/json", BODY, f"Bearer {key}")
    return [Departure(at_s, wire) for at_s in arrivals(rate, seconds, seed)]


def _by_status(missed: Counter[int]) -> str:
    return ", ".join(f"{count} with {status or 'none'}" for status, count in missed.items()) or "0"


def _p95(answers: Sequence[Answer]) -> float:
    return quantile([answer.latency_s for answer in answers if answer.status == 200], 0.95)
