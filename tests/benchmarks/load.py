"""The open-loop load of the goodput benchmark, from a process of its own; it looks at the pictures afterwards."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.benchmarks.results import Outcome
from tests.support.open_loop import Answer, Departure, post, send

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


def offer(url: str, calls: Sequence[Call], objective_s: float) -> Outcome:
    """What ``LoadProcess`` runs."""
    host = url.removeprefix("http://")
    departures = [Departure(call.at_s, post(host, call.path, call.content_type, call.body)) for call in calls]
    return judge(calls, asyncio.run(send(host, departures, keep_bodies=True)), objective_s)


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
