"""A JobStore on Redis or Valkey: any number of APIs and workers, jobs that outlive all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import structlog
from pydantic import TypeAdapter, ValidationError
from redis.asyncio import Redis

from server.costs import Offer
from server.jobs import (
    MAX_ATTEMPTS,
    MAX_CRASHES,
    POISON,
    Backlog,
    Delivery,
    End,
    IdempotencyConflictError,
    IdempotencyKey,
    Job,
    JobEvent,
    JobFailure,
    JobResult,
    JobState,
    JobStatus,
    Lease,
    Report,
    Submission,
    Total,
)
from server.stores.base import StoreUnavailableError, UnreadableJobError
from server.stores.redis import wire
from server.stores.redis.connections import ANSWER_S, connect
from server.stores.redis.errors import translated
from server.stores.redis.patience import patiently
from server.stores.redis.scripts import Scripts
from server.stores.redis.signals import ARRIVED, Signals, signalled

LOOK_S = 1.0
"""Those who wait look at the store at least so often; signals only make it sooner."""

EVENTS_AT_ONCE = 100
ENDS_AT_ONCE = 200

UNREADABLE = JobFailure(
    code="unreadable_job", message="The worker runs another version, which cannot read this request; send it again."
)

_OFFERS = TypeAdapter(dict[str, Offer])
_log = structlog.get_logger()
_LIMITS = (MAX_ATTEMPTS, MAX_CRASHES, wire.written(POISON))


class RedisStore:
    """url: ``redis://`` or ``rediss://``; lease_s and result_ttl_s: see Settings; prefix: of every key.

    No transition is sent twice: after a lost answer nobody knows whether it took effect, so the caller is told
    (StoreUnavailableError) and decides. Those who wait for a job or follow it read again for a while, see
    ``patiently``. Raises: ValueError when the URL is none.
    """

    outlives_process = True

    def __init__(
        self,
        url: str,
        lease_s: float = 30.0,
        result_ttl_s: float = 300.0,
        *,
        answer_s: float = ANSWER_S,
        prefix: str = "halfstep:",
    ) -> None:
        self._redis = Redis.from_pool(connect(url, answer_s))
        self._prefix = prefix
        self._lease_ms = round(lease_s * 1000)
        self._scripts = Scripts(self._redis, prefix, round(result_ttl_s * 1000), self._lease_ms)
        self._signals = Signals(self._redis, f"{prefix}told")

    async def submit(self, job: Job, key: IdempotencyKey | None = None) -> Submission:
        args = (*wire.job_args(job), *wire.key_args(key))
        answer, job_id = await self._scripts.run("submit", *args)
        if answer == b"conflict":
            raise IdempotencyConflictError
        if answer == b"exists":
            raise ValueError("a job with this id exists")
        return Submission(job_id=job_id.decode(), replayed=answer == b"replayed")

    async def find_key(self, tenant: str, key: str) -> tuple[IdempotencyKey, str] | None:
        hashed = self._key("key", wire.key_name(tenant, key))
        fingerprint, job_id = await _ask(self._redis.hmget(hashed, ["fingerprint", "job"]))
        if fingerprint is None:
            return None
        return IdempotencyKey(tenant=tenant, key=key, fingerprint=fingerprint.decode()), job_id.decode()

    async def claim(self, worker: str, models: Collection[str], rows: int, wait_s: float = 0.0) -> list[Lease]:
        until = time.monotonic() + wait_s
        with self._signals.on(ARRIVED) as arrived:
            while True:
                replies = await self._scripts.run("claim", worker, rows, *sorted(models))
                left_s = until - time.monotonic()
                if replies or left_s <= 0:
                    return await self._readable(replies, worker)
                await signalled(arrived, min(left_s, LOOK_S))

    async def heartbeat(self, leases: Collection[Lease]) -> frozenset[str]:
        args = [part for lease in leases for part in wire.held_args(lease)]
        return _tokens(await self._scripts.run("heartbeat", *args)) if args else frozenset()

    async def progress(self, reports: Sequence[Report]) -> frozenset[str]:
        args: list[str | int | bytes] = []
        for report in reports:
            args += [*wire.held_args(report.lease), report.step, len(report.previews)]
            args += [part for p in report.previews for part in (p.image, p.index, p.data)]
        return _tokens(await self._scripts.run("progress", *args)) if args else frozenset()

    async def finish(self, lease: Lease, result: JobResult) -> bool:
        return bool(await self._scripts.run("finish", *wire.held_args(lease), wire.written(result)))

    async def fail(self, lease: Lease, failure: JobFailure) -> bool:
        return bool(await self._scripts.run("fail", *wire.held_args(lease), wire.written(failure)))

    async def expire(self, lease: Lease) -> bool:
        return bool(await self._scripts.run("expire", *wire.held_args(lease)))

    async def give_back(self, lease: Lease, *, crashed: bool = False) -> JobStatus | None:
        args = (*wire.held_args(lease), int(crashed), int(lease.alone), *_LIMITS)
        return wire.RETURNED[await self._scripts.run("give_back", *args)]

    async def cancel(self, job_id: str) -> bool:
        return bool(await self._scripts.run("cancel", job_id))

    async def abandon(self, job_id: str, failure: JobFailure) -> bool:
        return bool(await self._scripts.run("abandon", job_id, wire.written(failure)))

    async def get(self, job_id: str) -> JobState | None:
        fields = await _ask(self._redis.hgetall(self._key("job", job_id)))
        if not fields:
            return None
        queued = fields[b"status"] == b"queued"
        return wire.state_from(fields, await self._scripts.run("position", job_id) if queued else None)

    async def wait(self, job_id: str) -> JobState:
        await self.until_ended(job_id)
        state = await patiently(self.get, job_id)
        if state is None:
            raise KeyError(job_id)
        return state

    async def until_ended(self, job_id: str) -> None:
        with self._signals.on(f"!{job_id}") as ended, suppress(KeyError):
            while not (await patiently(self._status, job_id)).terminal:
                await signalled(ended, LOOK_S)

    async def ends(self, job_ids: Iterable[str]) -> dict[str, End]:
        ids, found = list(job_ids), dict[str, End]()
        for start in range(0, len(ids), ENDS_AT_ONCE):
            found.update(map(wire.end_from, await self._scripts.run("ends", *ids[start : start + ENDS_AT_ONCE])))
        return found

    def is_event_id(self, text: str) -> bool:
        return wire.is_event_id(text)

    async def events(self, job_id: str, after: str | None = None) -> AsyncIterator[JobEvent]:
        if after is not None and not self.is_event_id(after):
            raise ValueError("there is no such event")
        start = "-" if after is None else f"({after}"
        with self._signals.on(job_id) as told:
            while True:
                status = await patiently(self._status, job_id)
                found = await patiently(self._history, job_id, start)
                for entry, fields in found:
                    event = wire.event_from(entry, fields)
                    start = f"({event.id}"
                    yield event
                    if event.terminal:
                        return
                if not found:
                    if status.terminal:
                        return
                    await signalled(told, LOOK_S)

    async def forget(self, job_id: str) -> None:
        await self._scripts.run("forget", job_id)

    async def backlog(self, tenant: str | None = None, *, models: Collection[str] | None = None) -> Backlog:
        if models is None:
            return await self._work(self._key("backlog", *([] if tenant is None else [tenant])))
        each = await asyncio.gather(*(self._work(self._key("work", model)) for model in models))
        return sum(each, Backlog())

    async def totals(self) -> list[Total]:
        counted = await _ask(self._redis.hgetall(self._key("totals")))
        return [wire.total_from(name, count) for name, count in counted.items()]

    async def expire_late(self) -> None:
        await self._scripts.run("expire_late")

    async def reap(self) -> int:
        return int(await self._scripts.run("reap", *_LIMITS))

    async def announce(self, worker: str, offers: Mapping[str, Offer]) -> None:
        told = _OFFERS.dump_json(dict(offers))
        await _ask(self._redis.sadd(self._key("workers"), worker))
        await _ask(self._redis.set(self._key("offer", worker), told, px=self._lease_ms))

    async def offers(self) -> dict[str, dict[str, Offer]]:
        workers = [name.decode() for name in await _ask(self._redis.smembers(self._key("workers")))]
        if not workers:
            return {}
        told = await _ask(self._redis.mget([self._key("offer", worker) for worker in workers]))
        gone = [worker for worker, offers in zip(workers, told, strict=True) if offers is None]
        if gone:
            await _ask(self._redis.srem(self._key("workers"), *gone))
        return {w: _offers_from(offers) for w, offers in zip(workers, told, strict=True) if offers}

    async def claim_deliveries(self, n: int) -> list[Delivery]:
        return [wire.delivery_from(reply) for reply in await self._scripts.run("claim_deliveries", n)]

    async def delivered(self, delivery: Delivery) -> bool:
        return bool(await self._scripts.run("settle_delivery", delivery.job_id, delivery.claim, "", 0))

    async def retry_delivery(self, delivery: Delivery, delay_s: float, *, put_off: bool = False) -> bool:
        args = (delivery.job_id, delivery.claim, round(delay_s * 1000), int(put_off))
        return bool(await self._scripts.run("settle_delivery", *args))

    async def ping(self) -> None:
        await _ask(self._redis.set(self._key("ping"), 1, px=1000))  # a write: a full Redis would refuse it

    async def risks(self) -> list[str]:
        found: dict[str | bytes, Any] = {}
        for ask in (self._redis.info, partial(self._redis.config_get, "appendfsync")):
            with suppress(StoreUnavailableError):  # which many a rented one, or this user, may not be asked
                found |= await _ask(ask())
        return wire.risks_in(found)

    async def close(self) -> None:
        await self._signals.close()
        await self._redis.aclose()

    async def _work(self, key: str) -> Backlog:
        values = await _ask(self._redis.hmget(key, ["jobs", "rows", "cost_us"]))
        jobs, rows, cost_us = (int(value or 0) for value in values)
        return Backlog(jobs=jobs, rows=rows, seconds=cost_us / 1e6)

    async def _status(self, job_id: str) -> JobStatus:
        """Raises: KeyError."""
        status = await _ask(self._redis.hget(self._key("job", job_id), "status"))
        if status is None:
            raise KeyError(job_id)
        return JobStatus(status.decode())

    async def _history(self, job_id: str, start: str) -> Any:
        return await _ask(self._redis.xrange(self._key("events", job_id), start, "+", EVENTS_AT_ONCE))

    async def _readable(self, replies: Sequence[wire.Reply], worker: str) -> list[Lease]:
        """The leases among them. A job that cannot be read fails alone: it would end one worker after another."""
        leases = []
        for reply in replies:
            try:
                leases.append(wire.lease_from(reply, worker))
            except UnreadableJobError as error:
                job_id, attempt = reply[0].decode(), reply[3]
                _log.error("job_unreadable", job=job_id, reason=str(error))
                with suppress(StoreUnavailableError):  # then its lease runs out, and it is found again
                    await self._scripts.run("fail", job_id, worker, attempt, wire.written(UNREADABLE))
        return leases

    def _key(self, *parts: str) -> str:
        return self._prefix + ":".join(parts)


def _offers_from(told: bytes) -> dict[str, Offer]:
    """Nothing from a worker of a version that tells it otherwise: it is there, and what it costs is not known."""
    try:
        return _OFFERS.validate_json(told)
    except ValidationError:
        return {}


async def _ask(call: Awaitable[Any]) -> Any:
    """Raises: StoreUnavailableError."""
    with translated():
        return await call


def _tokens(reply: Sequence[bytes]) -> frozenset[str]:
    return frozenset(token.decode() for token in reply)
