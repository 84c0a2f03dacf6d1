"""A client that writes down everything it was promised, over HTTP alone."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
POISON = "nine"
TERMINAL = ("succeeded", "failed", "cancelled", "expired")
GONE = (404, 410)
TRY_S = 10.0
RETRY_S = 0.2
POLL_S, MOST_POLL_S = 0.25, 3.0
AT_ONCE = 16
"""Requests under way: few, so that a slow machine is not drowned in polls that nobody waits for any more."""

TWICE = 0.1
"""Share of submissions sent once more, as by a client that missed the answer."""


@dataclass
class Entry:
    """One key and everything that was answered to it."""

    key: str
    prompt: str
    seed: int
    ids: set[str] = field(default_factory=set)
    status: str = ""
    code: str = ""
    images: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)

    @property
    def innocent(self) -> bool:
        return self.prompt != POISON


class Ledger:
    """apis: base URLs; any of them may be down at any time."""

    def __init__(self, apis: Sequence[str], jobs: int, poison: int, rng: random.Random) -> None:
        self._apis = apis
        self._rng = rng
        self._few = asyncio.Semaphore(AT_ONCE)
        bad = set(rng.sample(range(jobs), poison))
        prompts = [POISON if k in bad else DIGITS[rng.randrange(9)] for k in range(jobs)]
        self.entries = [Entry(f"key-{k}", prompt, rng.randrange(20)) for k, prompt in enumerate(prompts)]
        self.ended = 0

    async def run(self, seconds: float) -> None:
        """Submit over that time and follow every job to its end; cancel it to give up on the rest."""
        async with _client() as client, asyncio.TaskGroup() as group:
            for k, entry in enumerate(self.entries):
                group.create_task(self._follow(client, entry, seconds * k / len(self.entries)))

    async def read_again(self) -> None:
        """Fetch every result once more."""
        async with _client() as client:
            await asyncio.gather(*(self._fetch(client, entry) for entry in self.entries if entry.status))

    async def _follow(self, client: httpx.AsyncClient, entry: Entry, after_s: float) -> None:
        await asyncio.sleep(after_s)
        await self._submit(client, entry)
        if self._rng.random() < TWICE:
            await self._submit(client, entry)
        pause_s = POLL_S
        while not entry.status:
            await asyncio.sleep(pause_s * (0.5 + self._rng.random()))
            await self._look(client, entry)
            pause_s = min(1.5 * pause_s, MOST_POLL_S)
        self.ended += 1
        await self._fetch(client, entry)

    async def _submit(self, client: httpx.AsyncClient, entry: Entry) -> None:
        body = {"task": "text_to_image", "prompt": entry.prompt, "seed": entry.seed, "steps": 8}
        headers = {"Idempotency-Key": entry.key}
        answer = await self._insist(client, "POST", "/v1/jobs", entry, json=body, headers=headers)
        entry.ids.add(answer.json()["id"])

    async def _look(self, client: httpx.AsyncClient, entry: Entry) -> None:
        answer = await self._insist(client, "GET", f"/v1/jobs/{max(entry.ids)}", entry)
        body = answer.json()
        if answer.status_code in GONE:
            entry.status = "unknown"
        elif body["status"] in TERMINAL:
            entry.status = body["status"]
            entry.code = (body.get("error") or {}).get("code", "")

    async def _fetch(self, client: httpx.AsyncClient, entry: Entry) -> None:
        if entry.status == "succeeded":
            answer = await self._insist(client, "GET", f"/v1/jobs/{max(entry.ids)}/images/0", entry)
            if answer.status_code == 200:
                entry.images.add(hashlib.sha256(answer.content).hexdigest())
            else:
                entry.errors.append("the result of a job that succeeded is gone")

    async def _insist(
        self,
        client: httpx.AsyncClient,
        method: str,
        path: str,
        entry: Entry,
        *,
        json: dict[str, object] | None = None,
        headers: dict[str, str] | None = None,
    ) -> httpx.Response:
        """Ask until one of the APIs answers; 503 and 429 ask for patience, other refusals are written down."""
        while True:
            url = self._rng.choice(self._apis) + path
            try:
                async with self._few:
                    answer = await client.request(method, url, json=json, headers=headers)
            except httpx.HTTPError:
                await asyncio.sleep(RETRY_S)
                continue
            if answer.status_code in (503, 429):
                if "retry-after" not in answer.headers:
                    entry.errors.append(f"{answer.status_code} without Retry-After")
                await asyncio.sleep(RETRY_S)
                continue
            if answer.status_code >= 400 and answer.status_code not in GONE:
                entry.errors.append(f"{answer.status_code} {answer.text[:200]}")
                await asyncio.sleep(RETRY_S)
                continue
            return answer


def _client() -> httpx.AsyncClient:
    """Without a limit of its own: connections that a killed server leaves behind would fill its pool for ever."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=AT_ONCE)
    return httpx.AsyncClient(timeout=TRY_S, limits=limits)
