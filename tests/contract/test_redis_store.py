"""What only a store of many processes must do: outlive its server, say when it is away, leave nothing behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from server.jobs import IdempotencyKey, JobStatus
from server.stores.base import UnreadableJobError
from server.stores.redis import patience
from server.stores.redis.store import RedisStore
from tests.contract.lab import FAILURE, MODELS, RESULT, Lab, job, status
from tests.contract.redis_lab import PREFIX, SLOW_MACHINE_S, make_older
from tests.support.redis_server import BINARIES, RedisServer
from tests.support.serving import until

pytestmark = pytest.mark.anyio

LEASE_S, TTL_S = 10.0, 60.0


@pytest.fixture(params=sorted(BINARIES))
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with RedisServer(request.param, "always") as made:
        yield made


@pytest.fixture
async def store(server: RedisServer) -> Any:
    made = RedisStore(server.url, LEASE_S, TTL_S, answer_s=SLOW_MACHINE_S, prefix=PREFIX)
    yield made
    await made.close()


def undelivered(server: RedisServer) -> int:
    streams = server.client.keys(f"{PREFIX}lane:*")
    pending = sum(server.client.xpending(stream, "workers")["pending"] for stream in streams)
    return sum(map(server.client.xlen, streams)) - pending


def milliseconds(server: RedisServer) -> int:
    seconds, micros = server.client.time()
    return int(seconds) * 1000 + int(micros) // 1000


async def test_everything_survives_the_server_being_killed(server: RedisServer, store: RedisStore) -> None:
    key = IdempotencyKey(tenant="t", key="k", fingerprint="f")
    await store.submit(job("queued"), key)
    await store.submit(job("held", priority=1))
    (lease,) = await store.claim("w", MODELS, 1)
    server.kill()
    with pytest.raises(OSError, match="does not answer"):
        await store.backlog()
    server.start()
    assert (await store.submit(job("again"), key)).job_id == "queued"
    assert await store.heartbeat([lease]) == frozenset()
    assert await store.finish(lease, RESULT)
    (other,) = await store.claim("w", MODELS, 10)
    assert other.job.id == "queued"
    assert (await store.backlog()).jobs == 1


async def test_a_server_that_hangs_is_noticed_and_forgiven(
    server: RedisServer, store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "OUTAGE_S", 1.0)
    await store.submit(job("a"))
    patient, store = store, RedisStore(server.url, LEASE_S, TTL_S, prefix=PREFIX)
    waiting = asyncio.create_task(store.wait("a"))
    claiming = asyncio.create_task(store.claim("w", ["other"], 10, wait_s=60))
    await asyncio.sleep(0)
    server.freeze()
    for call in (
        store.ping(),
        store.submit(job("b")),
        store.get("a"),
        store.claim("w", MODELS, 1),
        waiting,
        claiming,
    ):
        with pytest.raises(OSError, match="does not answer"):
            await call
    server.thaw()
    await patient.ping()
    assert await status(Lab(patient, None), "a") is JobStatus.QUEUED  # type: ignore[arg-type]
    await store.close()


async def test_those_who_wait_bear_a_restart_of_the_server(
    server: RedisServer, store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "OUTAGE_S", SLOW_MACHINE_S)

    async def history() -> list[str]:
        return [event.type async for event in store.events("a")]

    await store.submit(job("a"))
    (lease,) = await store.claim("w", MODELS, 1)
    waiting, following = asyncio.create_task(store.wait("a")), asyncio.create_task(history())
    await asyncio.sleep(0)
    server.kill()
    with pytest.raises(OSError, match="does not answer"):
        await store.ping()
    await asyncio.wait([waiting, following], timeout=0.5)
    server.start()
    assert await store.finish(lease, RESULT)
    assert (await waiting).status is JobStatus.SUCCEEDED
    assert await following == ["queued", "running", "succeeded"]


async def until_closed(store: RedisStore) -> None:
    """Until the loop has read the end of every connection that is at rest, of which there are some."""
    resting = store._redis.connection_pool._available_connections
    assert resting
    async with asyncio.timeout(60):
        for connection in resting:
            assert connection._reader is not None
            await connection._reader.read()


async def test_connections_cut_by_the_server_are_made_again(server: RedisServer, store: RedisStore) -> None:
    for k in range(5):
        await store.submit(job(f"j{k}"))
        server.client.client_kill_filter(_type="normal", skipme=True)
        await until_closed(store)
    assert (await store.backlog()).jobs == 5


async def test_a_full_server_takes_no_work_but_ends_what_it_has(server: RedisServer, store: RedisStore) -> None:
    await store.submit(job("a"))
    (lease,) = await store.claim("w", MODELS, 1)
    server.client.config_set("maxmemory", 1)
    for call in (store.ping(), store.submit(job("b"))):
        with pytest.raises(OSError, match="does not answer"):
            await call
    assert await store.heartbeat([lease]) == frozenset()
    assert await store.finish(lease, RESULT)
    server.client.config_set("maxmemory", 0)
    await store.ping()
    assert await store.get("b") is None, "nothing of a refused job is left"
    assert (await store.backlog()).jobs == 0


async def test_deleted_streams_lose_no_job(server: RedisServer, store: RedisStore) -> None:
    for name in ("returned", "held", "queued"):
        await store.submit(job(name))
    first, held = await store.claim("w", MODELS, 2)
    await store.give_back(first)
    server.client.delete(*server.client.keys(f"{PREFIX}lane:*"), *server.client.keys(f"{PREFIX}returned:*"))
    await store.reap()
    assert await store.heartbeat([held]) == {held.token}, "its hold cannot be seen any more, so it is another's"
    leases = await store.claim("w", MODELS, 10)
    assert {lease.job.id for lease in leases} == {"returned", "held", "queued"}
    for lease in leases:
        assert await store.finish(lease, RESULT)


async def test_a_stream_made_again_serves_old_and_new(server: RedisServer, store: RedisStore) -> None:
    for name in ("old", "older"):
        await store.submit(job(name))
    server.client.delete(*server.client.keys(f"{PREFIX}lane:*"))
    deleted = milliseconds(server)
    until(lambda: milliseconds(server) > deleted, "the next millisecond, by which a stream numbers its entries")
    for name in ("new", "newer"):
        await store.submit(job(name))
    leases = await store.claim("w", MODELS, 10)
    assert [lease.job.id for lease in leases] == ["old", "older", "new", "newer"]
    assert undelivered(server) == 0
    assert [await store.finish(lease, RESULT) for lease in leases] == [True] * 4
    assert server.client.keys(f"{PREFIX}lane:*") == []


async def test_an_entry_is_never_deleted_undelivered(server: RedisServer, store: RedisStore) -> None:
    for k in range(6):
        await store.submit(job(f"j{k}"))
    await store.cancel("j1")
    await store.cancel("j5")
    assert undelivered(server) == 6, "that would blind whoever reads the group's lag"
    leases = await store.claim("w", MODELS, 3)
    assert [lease.job.id for lease in leases] == ["j0", "j2", "j3"]
    assert undelivered(server) == 2


async def test_ended_jobs_leave_only_the_counters(server: RedisServer, store: RedisStore) -> None:
    for k in range(20):
        key = IdempotencyKey(tenant=f"t{k % 3}", key=str(k), fingerprint="f") if k % 2 else None
        await store.submit(job(f"j{k}", tenant=f"t{k % 3}", priority=k % 4, deadline_ms=90_000), key)
    leases = await store.claim("w", MODELS, 12)
    for lease in leases[:5]:
        await store.finish(lease, RESULT)
    await store.fail(leases[5], FAILURE)
    await store.give_back(leases[6])
    for k in range(20):
        await store.cancel(f"j{k}")
    assert await store.claim("w", MODELS, 10) == []
    await store.reap()
    make_older(server.client, round((TTL_S + 1) * 1000))
    names = {key.decode().removeprefix(PREFIX) for key in server.client.scan_iter()}
    assert names <= {"backlog", "totals", "served", "level", "ping"}
    totals = await store.totals()
    assert sum(t.count for t in totals if t.status is None) == 20
    assert sum(t.count for t in totals if t.status) == 20
    assert {t.status for t in totals} == {None, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}


async def test_a_job_of_another_version_fails_alone_and_its_words_are_not_told(
    server: RedisServer, store: RedisStore
) -> None:
    await store.submit(job("old"))
    await store.submit(job("new"))
    data = json.loads(server.client.hget(f"{PREFIX}job:old", "data"))
    data["request"] |= {"prompt": "canary", "added_later": "canary"}
    server.client.hset(f"{PREFIX}job:old", "data", json.dumps(data))
    with capture_logs() as logs:
        leases = await store.claim("w", MODELS, 10)
    assert [lease.job.id for lease in leases] == ["new"]
    assert server.client.hget(f"{PREFIX}job:old", "status") == b"failed"
    assert (await store.backlog()).jobs == 1
    (line,) = logs
    assert line["event"] == "job_unreadable"
    with pytest.raises(UnreadableJobError, match="added_later") as caught:
        await store.get("old")
    assert "canary" not in f"{line} {caught.value!r}"


async def test_a_worker_that_tells_its_offers_otherwise_is_there(server: RedisServer, store: RedisStore) -> None:
    await store.announce("w", {})
    server.client.set(f"{PREFIX}offer:w", '{"m": {"engine": "e", "ms": {}, "added_later": 1}}')
    assert await store.offers() == {"w": {}}


async def test_workers_that_are_gone_leave_nothing(server: RedisServer, store: RedisStore) -> None:
    """Each pod has a name of its own."""
    for name in ("old", "new"):
        await store.announce(name, {})
    make_older(server.client, round((LEASE_S + 1) * 1000))
    await store.announce("new", {})
    assert await store.offers() == {"new": {}}
    assert server.client.smembers(f"{PREFIX}workers") == {b"new"}


async def test_the_ends_of_many_jobs_are_asked_for_in_parts(
    store: RedisStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.stores.redis.store.ENDS_AT_ONCE", 2)
    names = [f"j{k}" for k in range(5)]
    assert (await store.ends(names)).keys() == set(names)
