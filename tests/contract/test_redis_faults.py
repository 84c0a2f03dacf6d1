"""A Redis that is full, out of disk or cutting connections: what it refuses is said, what it accepted is kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from server.jobs import IdempotencyKey, JobStatus
from server.stores.base import StoreUnavailableError
from server.stores.redis.store import RedisStore
from tests.contract.lab import MODELS, RESULT, job
from tests.contract.redis_lab import PREFIX, SLOW_MACHINE_S
from tests.support.redis_server import BINARIES, RedisServer

pytestmark = pytest.mark.anyio

TRIES = 3000
EACH = pytest.mark.parametrize("binary", sorted(BINARIES))


@asynccontextmanager
async def store_of(server: RedisServer) -> AsyncIterator[RedisStore]:
    made = RedisStore(server.url, answer_s=SLOW_MACHINE_S, prefix=PREFIX)
    yield made
    await made.close()


async def submit_until_refused(store: RedisStore, name: str) -> list[str]:
    """Ids of what was accepted before the first refusal."""
    accepted = []
    for k in range(TRIES):
        try:
            accepted.append((await store.submit(job(f"{name}{k}"))).job_id)
        except StoreUnavailableError:
            return accepted
        await asyncio.sleep(0.001)
    raise AssertionError("nothing was refused")


async def until_up(store: RedisStore) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                return await store.ping()
            except StoreUnavailableError:
                await asyncio.sleep(0.05)


async def statuses(store: RedisStore, names: list[str]) -> set[JobStatus | None]:
    states = [await store.get(name) for name in names]
    return {None if state is None else state.status for state in states}


@EACH
async def test_a_full_disk_takes_no_work_and_is_forgiven_without_a_restart(binary: str) -> None:
    with RedisServer(binary, "everysec") as server:
        async with store_of(server) as store:
            await store.submit(job("held"))
            (lease,) = await store.claim("w", MODELS, 1)
            server.fill_disk()
            accepted = await submit_until_refused(store, "a")
            with pytest.raises(StoreUnavailableError, match="MISCONF"):
                await store.ping()
            with pytest.raises(StoreUnavailableError):
                await store.finish(lease, RESULT)
            assert await statuses(store, ["held"]) == {JobStatus.RUNNING}, "what is there can still be read"
            server.free_disk()
            await until_up(store)
            assert await store.finish(lease, RESULT)
            assert await statuses(store, accepted) <= {JobStatus.QUEUED}
            assert (await store.backlog()).jobs == len(accepted)
            server.client.shutdown(nosave=True)
            server.process.wait(60)
            server.start()
            await until_up(store)
            assert await statuses(store, accepted) <= {JobStatus.QUEUED}
            assert await statuses(store, ["held"]) == {JobStatus.SUCCEEDED}


@EACH
async def test_a_full_disk_ends_a_durable_server_and_costs_nothing_accepted(binary: str) -> None:
    """It ends rather than acknowledge what it cannot keep; whoever watches over it starts it again."""
    with RedisServer(binary, "always") as server:
        async with store_of(server) as store:
            before = [(await store.submit(job(f"b{k}"))).job_id for k in range(20)]
            server.fill_disk()
            before += await submit_until_refused(store, "a")
            assert server.process.wait(60) != 0
            with pytest.raises(StoreUnavailableError):
                await store.ping()
            server.start()
            await until_up(store)
            assert await statuses(store, before) == {JobStatus.QUEUED}
            leases = await store.claim("w", MODELS, 1000)
            assert {lease.job.id for lease in leases} >= set(before)


@EACH
async def test_cut_connections_cost_no_job_and_make_none_twice(binary: str) -> None:
    with RedisServer(binary) as server:
        async with store_of(server) as store:
            cutting, refused = True, 0

            async def cut() -> None:
                while cutting:
                    for kind in ("normal", "pubsub"):
                        await asyncio.to_thread(server.client.client_kill_filter, _type=kind, skipme=True)
                    await asyncio.sleep(0.02)

            async def insist(k: int) -> str:
                nonlocal refused
                key = IdempotencyKey(tenant="t", key=str(k), fingerprint="f")
                while True:
                    try:
                        return (await store.submit(job(f"j{k}-{asyncio.get_running_loop().time()}"), key)).job_id
                    except StoreUnavailableError:
                        refused += 1
                        await asyncio.sleep(0.01)

            waiting = asyncio.create_task(cut())
            ids = [await insist(k) for k in range(300)]
            cutting = False
            await waiting
            assert refused, "no cut was felt"
            assert len(set(ids)) == 300
            assert (await store.backlog()).jobs == 300
            assert {lease.job.id for lease in await store.claim("w", MODELS, 1000)} == set(ids)
