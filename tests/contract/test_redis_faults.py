"""A Redis that is full, out of disk or cutting connections: what it refuses is said, what it accepted is kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from server.jobs import IdempotencyKey, JobStatus
from server.rates import Rates
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


@EACH
async def test_a_name_that_moves_to_another_server_is_followed(binary: str, tmp_path: Path) -> None:
    """As a failover does: connections stay open to what is a replica now, and refuses every write."""
    name = tmp_path / "redis.sock"
    with RedisServer(binary) as former, RedisServer(binary) as now:
        name.symlink_to(former.url.removeprefix("unix://"))
        store = RedisStore(f"unix://{name}", answer_s=SLOW_MACHINE_S, prefix=PREFIX)
        rates = Rates(f"unix://{name}", answer_s=SLOW_MACHINE_S)
        await store.submit(job("before"))
        await rates.spend("9/minute", 1, "a")
        name.unlink()
        name.symlink_to(now.url.removeprefix("unix://"))
        former.client.replicaof("127.0.0.1", 1)
        with pytest.raises(StoreUnavailableError, match="read only"):
            await store.ping()
        with pytest.raises(StoreUnavailableError):
            await rates.spend("9/minute", 1, "a")
        await store.submit(job("after"))
        assert await rates.spend("9/minute", 1, "a") is None
        await store.close()
        assert now.client.exists(f"{PREFIX}job:after")


RISKS: list[tuple[tuple[str | None, ...], list[str]]] = [
    (("always",), []),
    (("everysec",), ["appendfsync is everysec"]),
    ((None,), ["appendonly is no"]),
    (("always", "--maxmemory-policy", "allkeys-lru"), []),
    (("always", "--maxmemory", "64mb"), []),
    (("always", "--maxmemory", "64mb", "--maxmemory-policy", "volatile-lru"), ["maxmemory-policy is volatile-lru"]),
]


@EACH
@pytest.mark.parametrize(("options", "expected"), RISKS)
async def test_what_may_lose_jobs_is_told(binary: str, options: tuple[str, ...], expected: list[str]) -> None:
    with RedisServer(binary, *options) as server:
        async with store_of(server) as store:
            assert [risk.partition(",")[0].partition(":")[0] for risk in await store.risks()] == expected


async def test_who_may_not_ask_is_told_of_no_risk() -> None:
    with RedisServer("valkey", "everysec") as server:
        server.client.acl_setuser(
            "plain", enabled=True, passwords=["+p"], keys=["*"], categories=["+@all", "-@dangerous"]
        )
        store = RedisStore(server.url.replace("unix://", "unix://plain:p@"), answer_s=SLOW_MACHINE_S)
        assert await store.risks() == []
        await store.close()
