"""Hours of mixed load, with requests given up and refused among it: nothing may grow."""

from __future__ import annotations

import asyncio
import base64
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from tests.support.command import Command
from tests.support.pictures import file_of, mask_file, photo
from tests.support.redis_server import RedisServer

RATE = 8.0
"""Requests a second, sent at Poisson times whether or not earlier ones were answered."""

SAMPLE_S = 2.0
WARM_UP = 0.3
"""Share of the run whose samples do not count: caches fill, allocators settle."""

RESULT_TTL_S = 20
MB_AN_HOUR, MB_AT_ALL = 1.0, 2.0
"""Memory may grow by so much an hour, and by as much as its samples jitter."""

MORE = {"descriptors": 8.0, "threads": 2.0, "keys": 100.0}
"""How far the medians of the first and last samples may lie apart; the load itself is random."""

EXPECTED = frozenset({200, 202, 400, 404, 409, 422, 429, 503})

PICTURE = file_of(photo())
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Request = Callable[[httpx.AsyncClient, str, int], Awaitable[int]]


@dataclass
class Soak:
    """samples: by what was measured, with its time in s; answers: how many of each status, 0 for none."""

    seconds: float
    samples: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    answers: Counter[int] = field(default_factory=Counter)

    @property
    def faults(self) -> list[str]:
        grown = [f"{name} grew by {self.growth(name):.1f}" for name in self.samples if self.grew(name)]
        odd = {status: count for status, count in self.answers.items() if status not in EXPECTED}
        return grown + ([f"answers {odd}"] if odd else [])

    def settled(self, name: str) -> list[float]:
        return [value for at_s, value in self.samples[name] if at_s >= WARM_UP * self.seconds]

    def growth(self, name: str) -> float:
        """From the median of the first quarter of the settled samples to that of the last."""
        values = self.settled(name)
        quarter = max(1, len(values) // 4)
        return statistics.median(values[-quarter:]) - statistics.median(values[:quarter])

    def grew(self, name: str) -> bool:
        kind = name.rpartition(" ")[2]
        hours = self.seconds * (1 - WARM_UP) * 0.75 / 3600
        return self.growth(name) > (MB_AT_ALL + MB_AN_HOUR * hours if kind == "MB" else MORE[kind])


def run(minutes: float, bundle: Path) -> Soak:
    """One API, one worker with its engine, one Redis, as users start them."""
    soak = Soak(60 * minutes)
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer("", "everysec"))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        environment = {"HALFSTEP_RESULT_TTL_S": str(RESULT_TTL_S), "OMP_NUM_THREADS": "1", "HALFSTEP_THREADS": "1"}
        processes = {}
        for name in ("worker", "api"):
            processes[name] = Command(name, redis.url, bundle, folder, environment=environment)
            stack.callback(processes[name].end)
        for process in processes.values():
            process.wait_ready()
        watched = {name: psutil.Process(process.process.pid) for name, process in processes.items()}
        (watched["engine"],) = watched["worker"].children()
        watched["redis"] = psutil.Process(redis.process.pid)
        asyncio.run(_drive(soak, processes["api"].url, watched, redis))
    return soak


async def _drive(soak: Soak, url: str, watched: dict[str, psutil.Process], redis: RedisServer) -> None:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=8)
    with Progress() as progress:
        bar = progress.add_task("soak", total=soak.seconds)
        async with httpx.AsyncClient(base_url=url, timeout=30, limits=limits) as client:
            loading, began = asyncio.create_task(_load(soak, client)), time.monotonic()
            while not loading.done():
                await asyncio.wait([loading], timeout=SAMPLE_S)
                at_s = time.monotonic() - began
                await asyncio.to_thread(_sample, soak, at_s, watched, redis)
                progress.update(bar, completed=at_s)
            await loading


def _sample(soak: Soak, at_s: float, watched: dict[str, psutil.Process], redis: RedisServer) -> None:
    for name, process in watched.items():
        values = {"MB": process.memory_info().rss / 1e6, "descriptors": process.num_fds()}
        for kind, value in {**values, "threads": process.num_threads()}.items():
            soak.samples.setdefault(f"{name} {kind}", []).append((at_s, value))
    keys: Any = redis.client.dbsize()
    soak.samples.setdefault("redis keys", []).append((at_s, float(keys)))


async def _load(soak: Soak, client: httpx.AsyncClient) -> None:
    rng, began = random.Random(1), time.monotonic()
    due_s, number = 0.0, 0
    async with asyncio.TaskGroup() as group:
        while (due_s := due_s + rng.expovariate(RATE)) < soak.seconds:
            await asyncio.sleep(max(0.0, began + due_s - time.monotonic()))
            request = rng.choices(list(REQUESTS), list(REQUESTS.values()))[0]
            group.create_task(_one(soak, client, request, rng.choice(DIGITS), number := number + 1))


async def _one(soak: Soak, client: httpx.AsyncClient, request: Request, prompt: str, number: int) -> None:
    try:
        soak.answers[await request(client, prompt, number)] += 1
    except httpx.HTTPError:
        soak.answers[0] += 1


async def _generation(client: httpx.AsyncClient, prompt: str, number: int) -> int:
    body = {"prompt": prompt, "seed": number, "n": 1 + number % 3, "output_format": ("png", "webp")[number % 2]}
    return (await client.post("/v1/images/generations", json=body)).status_code


async def _stream(client: httpx.AsyncClient, prompt: str, number: int) -> int:
    body = {"prompt": prompt, "seed": number, "steps": 8, "stream": True, "partial_images": 2}
    return (await client.post("/v1/images/generations", json=body)).status_code


async def _inpainting(client: httpx.AsyncClient, prompt: str, number: int) -> int:
    files = {"image": ("i.png", PICTURE, "image/png"), "mask": ("m.png", mask_file(), "image/png")}
    return (
        await client.post("/v1/images/edits", data={"prompt": prompt, "seed": str(number)}, files=files)
    ).status_code


async def _job(client: httpx.AsyncClient, prompt: str, number: int) -> int:
    """Sent twice under one key, waited for, and fetched."""
    body = {"task": "edit", "prompt": prompt, "seed": number, "image": base64.b64encode(PICTURE).decode()}
    headers = {"idempotency-key": str(number), "prefer": "wait=20"}
    answers = [await client.post("/v1/jobs", json=body, headers=headers) for _ in range(2)]
    if answers[0].status_code == 200 and answers[0].json()["status"] == "succeeded":
        return (await client.get(f"/v1/jobs/{answers[0].json()['id']}/images/0")).status_code
    return answers[0].status_code


async def _cancelled(client: httpx.AsyncClient, prompt: str, number: int) -> int:
    answer = await client.post("/v1/jobs", json={"prompt": prompt, "seed": number, "steps": 8})
    if answer.status_code != 202:
        return answer.status_code
    return (await client.delete(f"/v1/jobs/{answer.json()['id']}")).status_code


async def _left(client: httpx.AsyncClient, prompt: str, number: int) -> int:
    """A client that does not wait for its answer."""
    body = {"prompt": prompt, "seed": number, "n": 10, "steps": 8}
    try:
        async with asyncio.timeout(0.02):
            return (await client.post("/v1/images/generations", json=body)).status_code
    except TimeoutError:
        return 200


async def _automatic1111(client: httpx.AsyncClient, prompt: str, number: int) -> int:
    return (await client.post("/sdapi/v1/txt2img", json={"prompt": prompt, "seed": number})).status_code


async def _refused(client: httpx.AsyncClient, prompt: str, number: int) -> int:
    return (await client.post("/v1/images/generations", json={"prompt": prompt, "n": -number})).status_code


async def _looked_at(client: httpx.AsyncClient, prompt: str, number: int) -> int:
    return (await client.get("/metrics")).status_code


REQUESTS: dict[Request, float] = {
    _generation: 6,
    _stream: 2,
    _inpainting: 2,
    _job: 2,
    _cancelled: 2,
    _left: 2,
    _automatic1111: 1,
    _refused: 1,
    _looked_at: 1,
}
"""What is sent, and how often against each other."""


def tell(soak: Soak) -> int:
    """The verdict as a table; exit status."""
    table = Table("what", "least", "most", "first", "last", "growth")
    for name in soak.samples:
        values = soak.settled(name)
        figures = (min(values), max(values), values[0], values[-1], soak.growth(name))
        table.add_row(name, *(f"{figure:.1f}" for figure in figures))
    console = Console(width=120)
    console.print(table)
    console.print(f"answers by status: {dict(sorted(soak.answers.items()))}")
    console.print("faults: " + ("; ".join(soak.faults) or "none"))
    return 1 if soak.faults else 0
