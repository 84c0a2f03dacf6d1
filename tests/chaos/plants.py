"""Bugs to plant into the store, so that the harness can show it would notice them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from server.jobs import IdempotencyKey, Job, JobResult, Lease, Submission
from server.stores.redis import wire
from server.stores.redis.store import RedisStore


def _rewrite(store: RedisStore, script: str, *changes: tuple[str, str]) -> None:
    made = store._scripts._scripts[script]
    for old, new in changes:
        assert old in made._text, f"{script} has no such line to break: {old}"
        made._text = made._text.replace(old, new)


def _rewrite_all(store: RedisStore, old: str, new: str) -> None:
    for script in store._scripts._scripts:
        _rewrite(store, script, (old, new))


def no_fence(store: RedisStore) -> None:
    """Whoever once held a job may end it, whatever it is now."""
    fence = "if job and job.status == 'running' and job.worker == worker and job.attempt == attempt then"
    _rewrite_all(store, fence, "if job then")


def early_ack(store: RedisStore) -> None:
    """A job is acknowledged when it is claimed, not when it is done."""
    _rewrite(store, "claim", ("  leave_queue(job)\n", "  leave_queue(job)\n  drop(job.stream, job.entry)\n"))


def no_isolation(store: RedisStore) -> None:
    """A job that was in a dead engine process is tried again in company."""
    alone = "(job.lost ~= '0' or job.crashes ~= '0') and 1 or 0"
    _rewrite(store, "claim", (alone, "0"), ("job.lost ~= '0' or job.crashes ~= '0'\n", "false\n"))
    _rewrite(store, "give_back", ("ARGV[7] == '1' and 'crashes' or 'lost'", "'crashes'"))


def maxlen(store: RedisStore) -> None:
    """Streams are kept short."""
    _rewrite_all(store, "call('XADD', stream, '*', 'job', id)", "call('XADD', stream, 'MAXLEN', 1, '*', 'job', id)")


def no_xdel(store: RedisStore) -> None:
    """Entries are acknowledged, not deleted."""
    _rewrite_all(store, "  call('XDEL', stream, entry)\n", "")


def no_idempotency(store: RedisStore) -> None:
    """A key that was seen is accepted again."""

    async def find_key(tenant: str, key: str) -> None:
        return None

    store.find_key = find_key  # type: ignore[method-assign]
    _rewrite(store, "submit", ("if known[1] then return", "if false then return"))


def no_recovery(store: RedisStore) -> None:
    """Nobody takes back what dead workers held."""

    async def reap() -> int:
        return 0

    store.reap = reap  # type: ignore[method-assign]


def result_after_ack(store: RedisStore) -> None:
    """The acknowledgement is one call, the result another."""
    _rewrite(store, "forget", ("local id = ARGV[3]\n", "local id = ARGV[3]\n" + _FORGETS_THE_LEASE))
    finish = store.finish

    async def finish_late(lease: Lease, result: JobResult) -> bool:
        await store.forget(lease.job.id)
        await asyncio.sleep(0.3)
        return await finish(lease, result)

    store.finish = finish_late  # type: ignore[method-assign]


_FORGETS_THE_LEASE = """
local running = open(id)
if running then
  drop(running.stream, running.entry)
  call('SREM', P .. 'taken', id)
  return
end
"""


def key_before_job(store: RedisStore) -> None:
    """The idempotency key is one call, the job another."""
    submit = store.submit

    async def submit_in_two(job: Job, key: IdempotencyKey | None = None) -> Submission:
        if key is None:
            return await submit(job)
        name, fingerprint = wire.key_args(key)
        hashed = store._key("key", name)
        known: Any = await store._redis.hget(hashed, "job")
        if known is not None:
            return Submission(job_id=known.decode(), replayed=True)
        await store._redis.hset(hashed, mapping={"fingerprint": fingerprint, "job": job.id})
        await asyncio.sleep(0.2)
        return await submit(job)

    store.submit = submit_in_two  # type: ignore[method-assign]


def not_durable(store: RedisStore) -> None:
    """Redis keeps nothing on disk (see ``harness``, which starts it so)."""


@dataclass(frozen=True)
class Plant:
    """put: breaks a store; seen_as: the fault by which the harness must notice it."""

    put: Callable[[RedisStore], None]
    seen_as: str


PLANTS = {
    put.__name__: Plant(put, seen_as)
    for put, seen_as in (
        (no_fence, "second end"),
        (early_ack, "too many attempts"),
        (no_isolation, "innocent failed"),
        (maxlen, "too many attempts"),
        (no_xdel, "left over"),
        (no_idempotency, "two jobs for one key"),
        (no_recovery, "lost"),
        (result_after_ack, "lost"),
        (key_before_job, "lost"),
        (not_durable, "lost"),
    )
}
