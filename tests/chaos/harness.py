"""Faults against a fleet under load, and the verdict on what the ledger says afterwards."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from server.stores.redis.store import RedisStore
from tests.chaos.fleet import Fleet, Node
from tests.chaos.ledger import TERMINAL, Ledger
from tests.chaos.node import LEASE_S
from tests.chaos.plants import PLANTS

GIVE_UP_S = 20.0
"""Jobs that are open although nothing has ended for so long, and no fault is left to come, are lost."""

FREEZE_TRIES = 200

IN_FLIGHT = 8
"""Jobs a worker is expected to hold at these rates; so many more attempts a fault are its due."""


@dataclass(frozen=True)
class Plan:
    """seconds: over which jobs are submitted and faults spread; freezes: workers stopped past their lease.

    Of Redis: cuts of every connection, again and again for a while; times without memory for anything new; disks so
    full that it ends.
    """

    jobs: int
    seconds: float
    apis: int = 2
    workers: int = 3
    worker_kills: int = 0
    api_kills: int = 0
    redis_kills: int = 0
    freezes: int = 0
    cuts: int = 0
    memory_shortages: int = 0
    full_disks: int = 0
    poison: int = 0
    plant: str = ""
    seed: int = 1

    @property
    def worker_faults(self) -> int:
        """Times that what a worker held was lost to it; a cut may cost each worker what it was just given."""
        return self.worker_kills + self.freezes + 3 * self.poison + self.workers * (self.cuts + self.full_disks)


@dataclass
class Verdict:
    """faults: what must not have happened, by name; empty when all is well."""

    plan: Plan
    seconds: float = 0.0
    attempts: float = 0.0
    accepted: int = 0
    ended: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """No fault was seen, or with a bug planted the one that it must be seen as."""
        plant = self.plan.plant
        return PLANTS[plant].seen_as in self.faults if plant else not self.faults

    def note(self, fault: str, example: str) -> None:
        self.faults[fault] += 1
        if self.faults[fault] <= 3:
            self.examples.append(f"{fault}: {example}")


def run(plan: Plan, bundle: Path, log: Path) -> Verdict:
    """Start a fleet, load it, hurt it, and judge."""
    rng = random.Random(plan.seed)
    with Fleet(bundle, plan.apis, plan.workers, plan.plant, log) as fleet:
        fleet.wait_ready()
        ledger = Ledger([node.url for node in fleet.apis], plan.jobs, plan.poison, rng)
        began = time.monotonic()
        asyncio.run(_drive(plan, fleet, ledger, rng))
        verdict = Verdict(plan, time.monotonic() - began)
        _judge_promises(ledger, verdict)
        asyncio.run(_judge_store(plan, fleet, ledger, verdict))
        return verdict


async def _drive(plan: Plan, fleet: Fleet, ledger: Ledger, rng: random.Random) -> None:
    working = asyncio.create_task(ledger.run(plan.seconds))
    await _hurt(plan, fleet, rng)
    await asyncio.to_thread(fleet.wait_ready)
    ended, since = ledger.ended, time.monotonic()
    while not working.done() and time.monotonic() - since < GIVE_UP_S:
        await asyncio.wait([working], timeout=0.2)
        if ledger.ended != ended:
            ended, since = ledger.ended, time.monotonic()
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    await asyncio.wait_for(ledger.read_again(), 60)


async def _hurt(plan: Plan, fleet: Fleet, rng: random.Random) -> None:
    """Every fault at its time, spread over the whole plan. One worker is frozen only, so that it does come back."""
    began = time.monotonic()
    frozen, *killed = fleet.workers
    faults = [
        *[("kill", rng.choice(killed)) for _ in range(plan.worker_kills)],
        *[("kill", rng.choice(fleet.apis)) for _ in range(plan.api_kills)],
        *[("freeze", frozen) for _ in range(plan.freezes)],
        *[("redis", frozen) for _ in range(plan.redis_kills)],
        *[("cut", frozen) for _ in range(plan.cuts)],
        *[("memory", frozen) for _ in range(plan.memory_shortages)],
        *[("disk", frozen) for _ in range(plan.full_disks)],
    ]
    of_redis = {
        "redis": fleet.kill_redis,
        "cut": fleet.cut_connections,
        "memory": fleet.exhaust_memory,
        "disk": fleet.fill_disk,
    }
    rng.shuffle(faults)
    thawing, ice = [], asyncio.Lock()
    for k, (what, node) in enumerate(faults):
        due = began + plan.seconds * (k + 0.5) / len(faults)
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        if what == "kill":
            await asyncio.to_thread(node.restart)
        elif what in of_redis:
            await asyncio.to_thread(of_redis[what])
        else:
            thawing.append(asyncio.create_task(_freeze(fleet, node, ice)))
    await asyncio.sleep(max(0.0, began + plan.seconds - time.monotonic()))
    await asyncio.gather(*thawing)


async def _freeze(fleet: Fleet, node: Node, ice: asyncio.Lock) -> None:
    """SIGSTOP a worker that has jobs, until its leases have run out and others have done them."""
    async with ice:
        for _ in range(FREEZE_TRIES):
            node.process.send_signal(signal.SIGSTOP)
            if await asyncio.to_thread(fleet.has_jobs, node):
                break
            node.process.send_signal(signal.SIGCONT)
            await asyncio.sleep(0.02)
        await asyncio.sleep(LEASE_S + 2.5)
        node.process.send_signal(signal.SIGCONT)


def _judge_promises(ledger: Ledger, verdict: Verdict) -> None:
    """What a client can see: one job a key, an end for each, one result a request, innocents unharmed."""
    same = defaultdict(set)
    for entry in ledger.entries:
        if len(entry.ids) > 1:
            verdict.note("two jobs for one key", entry.key)
        if entry.status not in TERMINAL:
            verdict.note("lost", f"{entry.key} {entry.ids} {entry.status}")
        if entry.innocent and entry.status in TERMINAL and entry.status != "succeeded":
            verdict.note("innocent failed", f"{entry.key} {entry.status} {entry.code}")
        if not entry.innocent and (entry.status, entry.code) != ("failed", "poison"):
            verdict.note("poison not found out", f"{entry.key} {entry.status} {entry.code}")
        if len(entry.images) > 1:
            verdict.note("two results for one key", entry.key)
        for error in entry.errors:
            verdict.note("client error", f"{entry.key} {error}")
        same[entry.prompt, entry.seed] |= entry.images
    for request, images in same.items():
        if len(images) > 1:
            verdict.note("same request, other bytes", str(request))


async def _judge_store(plan: Plan, fleet: Fleet, ledger: Ledger, verdict: Verdict) -> None:
    """What the store and the metrics say: one end a job, attempts within reason, nothing left over."""
    store, attempts = RedisStore(fleet.redis.url, LEASE_S, answer_s=30), 0
    for entry in ledger.entries:
        for job_id in entry.ids:
            state = await store.get(job_id)
            if state is None or not state.status.terminal:
                continue
            attempts += state.attempt
            ends = [event async for event in store.events(job_id) if event.terminal]
            history = fleet.redis.client.xrange(f"halfstep:events:{job_id}")
            told = sum(fields[b"type"].decode() in TERMINAL for _, fields in history)
            if len(ends) != 1 or told != 1:
                verdict.note("second end", f"{entry.key} ended {told} times")
    backlog = await store.backlog()
    await store.close()
    verdict.attempts = attempts / plan.jobs
    spare = 1.1 if plan.worker_faults else 1.0  # who loses nothing has nothing done again
    if attempts > spare * plan.jobs + IN_FLIGHT * plan.worker_faults:
        verdict.note("too many attempts", f"{attempts} for {plan.jobs} jobs")
    left = fleet.redis.client.keys("halfstep:lane:*") + fleet.redis.client.keys("halfstep:returned:*")
    if "lost" not in verdict.faults and (left or backlog.jobs):
        verdict.note("left over", f"{len(left)} streams, {backlog.jobs} jobs")
    _judge_metrics(plan, fleet, verdict)


def _judge_metrics(plan: Plan, fleet: Fleet, verdict: Verdict) -> None:
    text = httpx.get(f"{fleet.apis[0].url}/metrics", timeout=10).text
    counts: Counter[str] = Counter()
    for line in text.splitlines():
        if line.startswith(("halfstep_jobs_accepted_total", "halfstep_jobs_total")):
            counts[line.partition("{")[0]] += int(float(line.rpartition(" ")[2]))
    verdict.accepted, verdict.ended = counts["halfstep_jobs_accepted_total"], counts["halfstep_jobs_total"]
    if not verdict.accepted == verdict.ended == plan.jobs:
        verdict.note("metrics", f"{verdict.accepted} accepted, {verdict.ended} ended, {plan.jobs} sent")
