"""An open-loop load: requests leave at Poisson times, whether or not earlier ones are answered.

Latency counts from the planned departure, so a server that falls behind cannot slow the load down
(no coordinated omission). The load runs in a process of its own; the pictures that came are looked at when it is
over.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.benchmarks.results import Outcome

TIMEOUT_S = 30.0
MOST_LEVELS = 2
"""A right picture is at most that far from the expected one in any pixel, in levels of 0 … 255."""

Pixels = NDArray[np.uint8]
"""(H, W, 3) RGB."""


@dataclass(frozen=True)
class Call:
    """One HTTP request. at_s: planned departure, seconds from the start; expected: the right picture."""

    at_s: float
    path: str
    content_type: str
    body: bytes
    expected: Pixels

    def wire(self, host: str) -> bytes:
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {self.content_type}\r\n"
            f"Content-Length: {len(self.body)}\r\nConnection: keep-alive\r\n\r\n"
        )
        return head.encode() + self.body


@dataclass(frozen=True)
class Answer:
    """status: of HTTP, 0 where no answer came; latency_s: from the planned departure."""

    status: int
    latency_s: float
    body: bytes


class LoadProcess:
    """A process that only sends and judges."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def offer(self, url: str, calls: Sequence[Call], objective_s: float) -> Outcome:
        """Send the calls to ``http://host:port`` at their times and judge the answers."""
        return self._pool.submit(offer, url, calls, objective_s).result()


@contextmanager
def load_process() -> Iterator[LoadProcess]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield LoadProcess(pool)


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Poisson times in [0, seconds); never none."""
    generator = np.random.default_rng(seed)
    gaps = generator.exponential(1 / rate, size=math.ceil(rate * seconds * 2) + 20)
    times = [float(t) for t in np.cumsum(gaps) if t < seconds]
    return times or [seconds / 2]


def offer(url: str, calls: Sequence[Call], objective_s: float) -> Outcome:
    """What ``LoadProcess`` runs."""
    answers = asyncio.run(_send_all(url.removeprefix("http://"), calls))
    return judge(calls, answers, objective_s)


def judge(calls: Sequence[Call], answers: Sequence[Answer], objective_s: float) -> Outcome:
    """answers: one a call, in order."""
    span_s = max(call.at_s for call in calls)
    answered = [(call, answer) for call, answer in zip(calls, answers, strict=True) if answer.status == 200]
    right = [answer for call, answer in answered if is_right(answer.body, call.expected)]
    within = [answer for answer in right if answer.latency_s <= objective_s]
    latencies = sorted(1000 * answer.latency_s for answer in right)
    return Outcome(
        offered=len(calls) / span_s,
        goodput=len(within) / span_s,
        within=len(within) / len(calls),
        rejected=sum(answer.status in (429, 503) for answer in answers),
        failed=sum(answer.status not in (200, 429, 503) for answer in answers),
        wrong=len(answered) - len(right),
        p50_ms=latencies[len(latencies) // 2] if latencies else None,
        p99_ms=latencies[math.ceil(0.99 * len(latencies)) - 1] if latencies else None,
    )


def is_right(body: bytes, expected: Pixels) -> bool:
    """Whether an answer holds the expected picture, in OpenAI's words or in the rivals'."""
    try:
        answer = json.loads(body)
        file = base64.b64decode(answer["data"][0]["b64_json"] if "data" in answer else answer["image"])
        drawn = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
    except (ValueError, KeyError, IndexError, TypeError, OSError, binascii.Error):
        return False
    return drawn.shape == expected.shape and bool(
        np.abs(drawn.astype(np.int16) - expected.astype(np.int16)).max() <= MOST_LEVELS
    )


async def _send_all(host: str, calls: Sequence[Call]) -> list[Answer]:
    idle: list[_Connection] = []
    wires = [call.wire(host) for call in calls]
    begun = time.perf_counter()

    async def one(call: Call, wire: bytes) -> Answer:
        due = begun + call.at_s
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        status, body = 0, b""
        with suppress(OSError, TimeoutError, EOFError, ValueError):  # what a broken connection raises
            connection = idle.pop() if idle else await _Connection.to(host)
            status, body = await asyncio.wait_for(connection.post(wire), TIMEOUT_S)
            idle.append(connection)
        return Answer(status, time.perf_counter() - due, body)

    try:
        return await asyncio.gather(*(one(call, wire) for call, wire in zip(calls, wires, strict=True)))
    finally:
        for connection in idle:
            connection.close()


class _Connection:
    """One kept-alive connection; only as much HTTP as the contenders speak."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def to(cls, host: str) -> _Connection:
        name, port = host.split(":")
        return cls(*await asyncio.open_connection(name, int(port)))

    async def post(self, wire: bytes) -> tuple[int, bytes]:
        """(status, body) of the answer, read to its end."""
        self._writer.write(wire)
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        body = b""
        for line in head.split("\r\n"):
            if line.startswith("content-length:"):
                body = await self._reader.readexactly(int(line.partition(":")[2]))
        return int(head.split(" ", 2)[1]), body

    def close(self) -> None:
        self._writer.close()
