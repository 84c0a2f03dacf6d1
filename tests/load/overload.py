"""Ten times what a server can make, for minutes: what it still makes, how fast it refuses, and how it recovers.

The engine sleeps through its steps, so that the load client, as large as it is, takes no core from it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.chaos.fleet import Fleet, Node
from tests.load.verdict import Finding, quantile, report
from tests.support.open_loop import Answer, Departure, arrivals, post, send
from tests.support.serving import until

PATH = "/v1/images/generations"
BODY = json.dumps({"prompt": "one", "n": 4, "steps": 8, "seed": 1}).encode()
ENVIRONMENT = {"HALFSTEP_MAX_QUEUE_S": "2"}
TIMES = 10
CLIENTS = 16
LONE = 10
START_S = 180
LOOK_S, RECOVERY_S = 0.5, 60.0
NORMAL = 2.0
"""Times a lone request's median that counts as normal again."""

ENOUGH_GOODPUT, MOST_MEMORY, MOST_REFUSAL_MS, MOST_RECOVERY_S = 0.9, 1.1, 100.0, 30.0


@dataclass(frozen=True)
class Server:
    """host: name:port; roots: the processes whose memory counts, with their children."""

    host: str
    roots: tuple[psutil.Process, ...]

    def resident_bytes(self) -> int:
        processes = [each for root in self.roots for each in (root, *root.children(recursive=True))]
        return sum(int(each.memory_info().rss) for each in processes)


def overload(store: str, seconds: float, bundle: Path, log: Path) -> bool:
    """Measure and print; whether the targets were met. store: memory or redis; seconds: of the overload."""
    with serving(store, bundle, log) as server:
        return asyncio.run(_measure(server, store, seconds))


@contextmanager
def serving(store: str, bundle: Path, log: Path, *, workers: int = 1, **environment: str) -> Iterator[Server]:
    """One API and its workers: one of them in the API's process, or all apart over a Redis."""
    with ExitStack() as stack:
        variables = {**ENVIRONMENT, **environment}
        if store == "memory":
            node = stack.enter_context(Node("serve", "", bundle, "", stack.enter_context(log.open("a")), variables))
            nodes, extra = [node], []
        else:
            fleet = stack.enter_context(Fleet(bundle, 1, workers, "", log, variables))
            nodes, extra = [*fleet.apis, *fleet.workers], [fleet.redis.process]
        for node in nodes:
            until(lambda node=node: node.ready or node.ended, "it is ready", START_S)  # type: ignore[misc]
            if node.ended:
                raise RuntimeError(f"it did not start: {log.read_text()[-2000:]}")
        pids = [process.pid for process in (*(node.process for node in nodes), *extra)]
        yield Server(nodes[0].url.removeprefix("http://"), tuple(psutil.Process(pid) for pid in pids))


async def _measure(server: Server, store: str, seconds: float) -> bool:
    wire = post(server.host, PATH, "application/json", BODY)
    lone_s = quantile([answer.latency_s for answer in await _one_by_one(server, wire, LONE)], 0.5)
    most = await capacity(server.host, wire, max(5.0, seconds / 20))
    before = server.resident_bytes()
    departures = (Departure(at_s, wire) for at_s in arrivals(TIMES * most, seconds, seed=1))
    peak = asyncio.create_task(_peak_bytes(server, seconds))
    answers = await send(server.host, departures)
    since = time.monotonic()
    recovered_s = await _recovery_s(server, wire, lone_s, since)
    return _judge(store, seconds, most, answers, await peak / before, recovered_s)


def _judge(
    store: str, seconds: float, most: float, answers: Sequence[Answer], memory: float, recovered_s: float
) -> bool:
    right = [a for a in answers if a.status == 200 and a.at_s + a.latency_s <= seconds]
    refused = [1000 * a.latency_s for a in answers if a.status in (429, 503)]
    broken = sum(a.status not in (200, 429, 503) for a in answers)
    share, p99 = len(right) / seconds / most, quantile(refused, 0.99)
    findings = [
        Finding("goodput over capacity", f"≥ {ENOUGH_GOODPUT:g}", f"{share:.2f}", share >= ENOUGH_GOODPUT),
        Finding("refusals, p99", f"≤ {MOST_REFUSAL_MS:.0f} ms", f"{p99:.0f} ms", p99 <= MOST_REFUSAL_MS),
        Finding("memory at its peak over before", f"≤ {MOST_MEMORY:g}", f"{memory:.3f}", memory <= MOST_MEMORY),
        Finding(
            "normal again after",
            f"≤ {MOST_RECOVERY_S:.0f} s",
            f"{recovered_s:.1f} s",
            recovered_s <= MOST_RECOVERY_S,
        ),
        Finding("neither made nor refused", "0", str(broken), broken == 0),
    ]
    offered = len(answers) / seconds
    title = f"{store}: {offered:.0f} requests/s for {seconds:.0f} s on a capacity of {most:.1f}"
    return report(f"{title}; {len(refused)} refused", findings)


async def _one_by_one(server: Server, wire: bytes, count: int) -> list[Answer]:
    return [answer for _ in range(count) for answer in await send(server.host, [Departure(0.0, wire)])]


async def capacity(host: str, wire: bytes, seconds: float, clients: int = CLIENTS) -> float:
    """Requests made a second by clients that each send the next when they have their answer."""
    made, begun = 0, time.monotonic()

    async def client() -> None:
        nonlocal made
        while time.monotonic() - begun < seconds:
            (answer,) = await send(host, [Departure(0.0, wire)])
            made += answer.status == 200

    await asyncio.gather(*(client() for _ in range(clients)))
    return made / (time.monotonic() - begun)


async def _peak_bytes(server: Server, seconds: float) -> int:
    peak, begun = 0, time.monotonic()
    while time.monotonic() - begun < seconds:
        peak = max(peak, server.resident_bytes())
        await asyncio.sleep(LOOK_S)
    return peak


async def _recovery_s(server: Server, wire: bytes, lone_s: float, since: float) -> float:
    """Seconds until a lone request took no longer than is normal; infinite where none did."""
    while time.monotonic() - since < RECOVERY_S:
        (answer,) = await _one_by_one(server, wire, 1)
        if answer.status == 200 and answer.latency_s <= NORMAL * lone_s:
            return time.monotonic() - since
        await asyncio.sleep(LOOK_S)
    return float("inf")
