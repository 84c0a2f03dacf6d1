"""Requests that leave at their times, whether or not earlier ones are answered.

Latency counts from the planned departure, so a server that falls behind cannot slow the load down
(no coordinated omission).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Departure:
    """One HTTP request. at_s: planned, seconds from the start; wire: as it is sent."""

    at_s: float
    wire: bytes


@dataclass(frozen=True)
class Answer:
    """status: of HTTP, 0 where no answer came; latency_s: from the planned departure, at_s."""

    status: int
    at_s: float
    latency_s: float
    body: bytes


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Poisson times in [0, seconds); never none."""
    generator = np.random.default_rng(seed)
    gaps = generator.exponential(1 / rate, size=math.ceil(rate * seconds * 2) + 20)
    times = [float(t) for t in np.cumsum(gaps) if t < seconds]
    return times or [seconds / 2]


def post(host: str, path: str, content_type: str, body: bytes, authorization: str = "") -> bytes:
    """A request on the wire. host: name:port."""
    key = f"Authorization: {authorization}\r\n" if authorization else ""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\n{key}Content-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: keep-alive\r\n\r\n"
    )
    return head.encode() + body


async def send(host: str, departures: Iterable[Departure], *, keep_bodies: bool = False) -> list[Answer]:
    """Send them in order of their times; the answers in the same order."""
    idle: list[_Connection] = []
    begun = time.perf_counter()

    async def one(departure: Departure) -> Answer:
        status, body = 0, b""
        with suppress(OSError, TimeoutError, EOFError, ValueError):  # what a broken connection raises
            while idle and idle[-1].ended:
                idle.pop().close()
            connection = idle.pop() if idle else await _Connection.to(host)
            status, body = await asyncio.wait_for(connection.send(departure.wire), TIMEOUT_S)
            idle.append(connection)
        late_s = time.perf_counter() - begun - departure.at_s
        return Answer(status, departure.at_s, late_s, body if keep_bodies else b"")

    async with asyncio.TaskGroup() as group:
        tasks = []
        for departure in departures:
            await asyncio.sleep(max(0.0, begun + departure.at_s - time.perf_counter()))
            tasks.append(group.create_task(one(departure)))
    for connection in idle:
        connection.close()
    return [task.result() for task in tasks]


class _Connection:
    """One kept-alive connection; only as much HTTP as the servers under test speak."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def to(cls, host: str) -> _Connection:
        name, port = host.split(":")
        return cls(*await asyncio.open_connection(name, int(port)))

    @property
    def ended(self) -> bool:
        """The server closed it, as it does with one that was idle for long."""
        return self._reader.at_eof()

    async def send(self, wire: bytes) -> tuple[int, bytes]:
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
