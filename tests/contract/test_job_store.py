"""What every JobStore does. Run over each store in ``job_store_labs.LABS``."""

from __future__ import annotations

import asyncio

import pytest

from server.costs import Offer
from server.jobs import MAX_ATTEMPTS, JobStatus, Preview, Report
from tests.contract.lab import FAILURE, LEASE_S, MODELS, RESULT, RESULT_TTL_S, Lab, job, status

pytestmark = pytest.mark.anyio


async def test_a_job_is_queued_then_running_then_succeeded(lab: Lab) -> None:
    await lab.store.submit(job("a"))
    assert await status(lab, "a") is JobStatus.QUEUED
    (lease,) = await lab.store.claim("w", MODELS, 10)
    assert await status(lab, "a") is JobStatus.RUNNING
    assert await lab.store.finish(lease, RESULT)
    state = await lab.store.wait("a")
    assert (state.status, state.result, state.step) == (JobStatus.SUCCEEDED, RESULT, 4)


async def test_claims_come_in_order_and_only_as_many_as_fit(lab: Lab) -> None:
    for name, n in (("a", 2), ("b", 3), ("c", 1)):
        await lab.store.submit(job(name, n))
    assert [lease.job.id for lease in await lab.store.claim("w", MODELS, 4)] == ["a"]
    assert await lab.store.claim("w", MODELS, 2) == [], "c must not overtake b"
    assert [lease.job.id for lease in await lab.store.claim("w", MODELS, 4)] == ["b", "c"]


async def test_a_job_is_claimed_once(lab: Lab) -> None:
    await lab.store.submit(job("a"))
    claims = await asyncio.gather(*(lab.store.claim(f"w{i}", MODELS, 10) for i in range(5)))
    assert sum(map(len, claims)) == 1


async def test_a_waiting_claim_gets_what_arrives(lab: Lab) -> None:
    waiting = asyncio.create_task(lab.store.claim("w", MODELS, 10, wait_s=30))
    await asyncio.sleep(0)
    await lab.store.submit(job("a"))
    assert [lease.job.id for lease in await waiting] == ["a"]


async def test_a_waiting_claim_returns_empty_in_the_end(lab: Lab) -> None:
    assert await lab.store.claim("w", MODELS, 10, wait_s=0.01) == []


async def test_the_time_in_the_queue_is_reported(lab: Lab) -> None:
    await lab.store.submit(job("a"))
    await lab.pass_time(2.0)
    (lease,) = await lab.store.claim("w", MODELS, 10)
    assert 2000 <= lease.queued_ms < 60_000
    await lab.pass_time(3.0)
    await lab.store.give_back(lease)
    (again,) = await lab.store.claim("w", MODELS, 10)
    assert 5000 <= again.queued_ms < 60_000, "its caller has waited since it was accepted"


async def test_late_jobs_end_without_a_worker(lab: Lab) -> None:
    await lab.store.submit(job("late", deadline_ms=1000))
    await lab.store.submit(job("early", deadline_ms=5000))
    await lab.store.submit(job("patient"))
    await lab.pass_time(2.0)
    await lab.store.expire_late()
    assert await status(lab, "late") is JobStatus.EXPIRED
    assert await status(lab, "early") is await status(lab, "patient") is JobStatus.QUEUED
    assert (await lab.store.backlog()).jobs == 2


async def test_the_same_id_twice_is_refused(lab: Lab) -> None:
    await lab.store.submit(job("a"))
    with pytest.raises(ValueError, match="exists"):
        await lab.store.submit(job("a"))


async def test_a_silent_lease_is_given_to_another_and_fenced(lab: Lab) -> None:
    await lab.store.submit(job("a"))
    await lab.store.submit(job("b"))
    (old, _) = await lab.store.claim("dead", MODELS, 10)
    await lab.pass_time(LEASE_S + 1)
    assert await lab.store.reap() == 2
    (new,) = await lab.store.claim("alive", MODELS, 10)
    assert (new.job.id, new.attempt) == ("a", 2), "jobs taken back keep their order and run alone"
    assert await lab.store.heartbeat([old]) == {old.token}
    assert await lab.store.progress([Report(lease=old, step=3)]) == {old.token}
    assert not await lab.store.finish(old, RESULT)
    assert not await lab.store.fail(old, FAILURE)
    assert await lab.store.finish(new, RESULT)
    assert await status(lab, "a") is JobStatus.SUCCEEDED


async def test_a_worker_that_has_its_lost_job_again_is_fenced_from_its_old_hold(lab: Lab) -> None:
    await lab.store.submit(job("a"))
    (old,) = await lab.store.claim("w", MODELS, 10)
    await lab.pass_time(LEASE_S + 1)
    assert await lab.store.reap() == 1
    (new,) = await lab.store.claim("w", MODELS, 10)
    assert await lab.store.heartbeat([old, new]) == {old.token}
    assert await lab.store.give_back(old) is None
    assert not await lab.store.finish(old, RESULT)
    assert await lab.store.finish(new, RESULT)


async def test_a_heartbeat_keeps_a_lease(lab: Lab) -> None:
    await lab.store.submit(job("a"))
    leases = await lab.store.claim("w", MODELS, 10)
    for _ in range(3):
        await lab.pass_time(LEASE_S - 1)
        assert await lab.store.heartbeat(leases) == frozenset()
        assert await lab.store.reap() == 0


async def test_only_the_first_end_counts(lab: Lab) -> None:
    await lab.store.submit(job("a"))
    (lease,) = await lab.store.claim("w", MODELS, 10)
    assert await lab.store.fail(lease, FAILURE)
    assert not await lab.store.finish(lease, RESULT)
    assert not await lab.store.cancel("a")
    state = await lab.store.wait("a")
    assert (state.status, state.failure, state.result) == (JobStatus.FAILED, FAILURE, None)


async def test_cancelling_a_queued_job_takes_it_out(lab: Lab) -> None:
    await lab.store.submit(job("a"))
    assert await lab.store.cancel("a")
    assert not await lab.store.cancel("a")
    assert await lab.store.claim("w", MODELS, 10) == []
    assert await status(lab, "a") is JobStatus.CANCELLED


async def test_cancelling_a_running_job_stops_its_worker(lab: Lab) -> None:
    await lab.store.submit(job("a"))
    (lease,) = await lab.store.claim("w", MODELS, 10)
    assert await lab.store.cancel("a")
    assert await lab.store.heartbeat([lease]) == {lease.token}
    assert not await lab.store.finish(lease, RESULT)


async def test_waiting_for_nothing_is_an_error(lab: Lab) -> None:
    assert await lab.store.get("nothing") is None
    with pytest.raises(KeyError):
        await lab.store.wait("nothing")
    assert not await lab.store.cancel("nothing")
    with pytest.raises(KeyError):
        [event async for event in lab.store.events("nothing")]


async def test_the_backlog_is_what_is_not_finished(lab: Lab) -> None:
    await lab.store.submit(job("a", n=2, cost_s=3.0))
    await lab.store.submit(job("b", n=1, cost_s=0.5))
    before = await lab.store.backlog()
    assert (before.jobs, before.rows, before.seconds) == (2, 3, pytest.approx(3.5))
    (lease, _) = await lab.store.claim("w", MODELS, 10)
    await lab.store.finish(lease, RESULT)
    await lab.store.cancel("b")
    after = await lab.store.backlog()
    assert (after.jobs, after.rows, after.seconds) == (0, 0, pytest.approx(0))


async def test_a_finished_job_is_kept_for_a_while(lab: Lab) -> None:
    await lab.store.submit(job("a"))
    (lease,) = await lab.store.claim("w", MODELS, 10)
    await lab.store.finish(lease, RESULT)
    await lab.pass_time(RESULT_TTL_S - 1)
    await lab.store.reap()
    assert await lab.store.get("a") is not None
    await lab.pass_time(2)
    await lab.store.reap()
    assert await lab.store.get("a") is None


async def test_forgetting_drops_only_what_is_over(lab: Lab) -> None:
    await lab.store.submit(job("a"))
    await lab.store.forget("a")
    assert await status(lab, "a") is JobStatus.QUEUED
    await lab.store.cancel("a")
    await lab.store.forget("a")
    assert await lab.store.get("a") is None


async def test_an_abandoned_job_has_failed_wherever_it_was(lab: Lab) -> None:
    await lab.store.submit(job("held"))
    (lease,) = await lab.store.claim("w", MODELS, 10)
    await lab.store.submit(job("queued"))
    for name in ("held", "queued"):
        assert await lab.store.abandon(name, FAILURE)
        assert not await lab.store.abandon(name, FAILURE)
        assert (await lab.store.wait(name)).failure == FAILURE
    assert await lab.store.heartbeat([lease]) == {lease.token}
    assert not await lab.store.finish(lease, RESULT)
    assert await lab.store.claim("w", MODELS, 10) == []
    assert not await lab.store.abandon("nothing", FAILURE)
    assert (await lab.store.backlog()).jobs == 0


async def test_a_job_that_loses_its_lease_over_and_over_fails(lab: Lab) -> None:
    await lab.store.submit(job("a"))
    for attempt in range(MAX_ATTEMPTS):
        (lease,) = await lab.store.claim("w", MODELS, 10)
        assert lease.attempt == attempt + 1
        await lab.pass_time(LEASE_S + 1)
        assert await lab.store.reap() == int(attempt + 1 < MAX_ATTEMPTS)
    state = await lab.store.wait("a")
    assert state.status is JobStatus.FAILED
    assert state.failure is not None
    assert state.failure.code == "poison"
    assert await lab.store.claim("w", MODELS, 10) == []
    assert (await lab.store.backlog()).jobs == 0


async def test_a_backlog_is_told_apart_by_tenant(lab: Lab) -> None:
    await lab.store.submit(job("a", n=2, cost_s=3.0, tenant="t"))
    await lab.store.submit(job("b", n=1, cost_s=0.5, tenant="u"))
    own = await lab.store.backlog("t")
    assert (own.jobs, own.rows, own.seconds) == (1, 2, pytest.approx(3.0))
    await lab.store.cancel("a")
    assert (await lab.store.backlog("t")).jobs == 0
    assert (await lab.store.backlog("u")).rows == (await lab.store.backlog()).rows == 1


async def test_a_backlog_is_told_apart_by_model(lab: Lab) -> None:
    await lab.store.submit(job("a", n=2, cost_s=3.0))
    await lab.store.submit(job("b", model="other", n=1, cost_s=0.5))
    own = await lab.store.backlog(models=("other",))
    assert (own.jobs, own.rows, own.seconds) == (1, 1, pytest.approx(0.5))
    both = await lab.store.backlog(models=("other", *MODELS, "unknown"))
    assert both == await lab.store.backlog()
    await lab.store.cancel("b")
    assert (await lab.store.backlog(models=("other",))).jobs == 0
    assert (await lab.store.backlog(models=MODELS)).rows == 2


async def test_progress_never_goes_back_when_a_preview_is_late(lab: Lab) -> None:
    await lab.store.submit(job("a"))
    (lease,) = await lab.store.claim("w", MODELS, 10)
    preview = Preview(image=0, index=0, data=b"png")
    for report in (Report(lease=lease, step=3), Report(lease=lease, step=2, previews=(preview,))):
        assert await lab.store.progress([report]) == frozenset()
    state = await lab.store.get("a")
    assert state is not None
    assert state.step == 3
    await lab.store.finish(lease, RESULT)
    told = [(event.type, event.step, event.preview) async for event in lab.store.events("a")]
    assert told[2:] == [("step", 3, None), ("step", 3, preview), ("succeeded", 4, None)]


async def test_whoever_waits_for_a_job_is_cancelled_even_as_one_comes(lab: Lab) -> None:
    waiting = asyncio.create_task(lab.store.claim("w", MODELS, 10, wait_s=30))
    await asyncio.sleep(0.05)
    await lab.store.submit(job("a"))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_ends_are_told_with_their_time_and_unknown_jobs_too(lab: Lab) -> None:
    for name in "abc":
        await lab.store.submit(job(name))
    await lab.pass_time(3)
    (lease,) = await lab.store.claim("w", MODELS, 1)
    await lab.store.finish(lease, RESULT)
    await lab.store.cancel("b")
    ends = await lab.store.ends(["a", "b", "c", "nothing"])
    assert {name: end.status for name, end in ends.items()} == {
        "a": JobStatus.SUCCEEDED,
        "b": JobStatus.CANCELLED,
        "nothing": None,
    }
    assert 3 <= ends["a"].seconds < 60
    assert await lab.store.ends([]) == {}


async def test_the_end_of_a_job_is_heard_whoever_ends_it(lab: Lab) -> None:
    await lab.store.submit(job("a"))
    await lab.store.submit(job("b"))
    waiting = [asyncio.create_task(lab.store.until_ended(name)) for name in "ab"]
    (lease, _) = await lab.store.claim("w", MODELS, 10)
    assert not any(task.done() for task in waiting)
    await lab.store.cancel("b")
    await lab.store.finish(lease, RESULT)
    async with asyncio.timeout(60):
        await asyncio.gather(*waiting)
        await lab.store.until_ended("nothing")


async def test_a_job_taken_back_starts_again_at_step_0(lab: Lab) -> None:
    await lab.store.submit(job("a"))
    (lease,) = await lab.store.claim("w", MODELS, 10)
    await lab.store.progress([Report(lease=lease, step=3)])
    await lab.store.give_back(lease)
    state = await lab.store.get("a")
    assert state is not None
    assert (state.status, state.step) == (JobStatus.QUEUED, 0)


async def test_a_worker_is_there_until_it_was_silent_for_a_lease(lab: Lab) -> None:
    offers = {"m": Offer(engine="e", ms={"step": {1: 2.5}})}
    for _ in range(2):
        await lab.store.announce("w", offers)
        assert await lab.store.offers() == {"w": offers}
        await lab.pass_time(LEASE_S - 1)
        assert await lab.store.offers() == {"w": offers}
    await lab.pass_time(2)
    assert await lab.store.offers() == {}
