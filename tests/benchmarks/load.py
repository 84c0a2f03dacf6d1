"""An open-loop load: requests leave at Poisson times, whether or not earlier ones are answered.

Latency counts from the planned departure, so a server that falls behind cannot slow the load down
(no coordinated omission).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Call:
    """One HTTP request. at_s: planned departure, seconds from the start."""

    at_s: float
    path: str
    body: bytes
    content_type: str = "application/json"

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


@dataclass(frozen=True)
class Outcome:
    """Of one load. goodput: answers a second that were right and within the objective."""

    offered: float
    goodput: float
    within: float
    rejected: int
    failed: int
    p50_ms: float
    p99_ms: float


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Poisson times in [0, seconds)."""
    generator = np.random.default_rng(seed)
    gaps = generator.exponential(1 / rate, size=math.ceil(rate * seconds * 2) + 20)
    return [float(t) for t in np.cumsum(gaps) if t < seconds]


def offer(url: str, calls: Sequence[Call], objective_s: float) -> Outcome:
    """Send the calls to ``http://host:port`` at their times and judge the answers."""
    answers = asyncio.run(_send_all(url.removeprefix("http://"), calls))
    span_s = max(call.at_s for call in calls)
    right = [answer for answer in answers if answer.status == 200]
    within = [answer for answer in right if answer.latency_s <= objective_s]
    latencies = sorted(1000 * answer.latency_s for answer in right) or [math.inf]
    return Outcome(
        offered=len(calls) / span_s,
        goodput=len(within) / span_s,
        within=len(within) / len(calls),
        rejected=sum(answer.status in (429, 503) for answer in answers),
        failed=sum(answer.status not in (200, 429, 503) for answer in answers),
        p50_ms=latencies[len(latencies) // 2],
        p99_ms=latencies[math.ceil(0.99 * len(latencies)) - 1],
    )


async def _send_all(host: str, calls: Sequence[Call]) -> list[Answer]:
    idle: list[_Connection] = []
    begun = time.perf_counter()

    async def one(call: Call) -> Answer:
        due = begun + call.at_s
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        status = 0
        try:
            connection = idle.pop() if idle else await _Connection.to(host)
            status = await asyncio.wait_for(connection.post(call.wire(host)), TIMEOUT_S)
            idle.append(connection)
        except (OSError, TimeoutError, EOFError, ValueError):  # what a broken connection raises
            pass
        return Answer(status, time.perf_counter() - due)

    try:
        return await asyncio.gather(*(one(call) for call in calls))
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

    async def post(self, wire: bytes) -> int:
        """Status of the answer, read to its end."""
        self._writer.write(wire)
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        for line in head.split("\r\n"):
            if line.startswith("content-length:"):
                await self._reader.readexactly(int(line.partition(":")[2]))
        return int(head.split(" ", 2)[1])

    def close(self) -> None:
        self._writer.close()
