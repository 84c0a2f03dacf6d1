"""What comes with a job: idempotency keys, deadlines, its history, webhooks, and the count of all."""

from __future__ import annotations

import asyncio
import time

import pytest

from server.jobs import IdempotencyConflictError, IdempotencyKey, JobEvent, JobStatus, Preview, Report
from tests.contract.lab import FAILURE, LEASE_S, MODELS, RESULT, RESULT_TTL_S, Lab, job, status

pytestmark = pytest.mark.anyio

KEY = IdempotencyKey(tenant="a", key="k", fingerprint="f")


async def history(lab: Lab, name: str, after: str | None = None) -> list[JobEvent]:
    async with asyncio.timeout(30):
        return [event async for event in lab.store.events(name, after)]


# ---- idempotency


async def test_a_key_accepts_one_job_however_often_it_comes(lab: Lab) -> None:
    answers = await asyncio.gather(*(lab.store.submit(job(f"j{k}"), KEY) for k in range(50)))
    assert len({answer.job_id for answer in answers}) == 1
    assert sum(answer.replayed for answer in answers) == 49
    assert (await lab.store.backlog()).jobs == 1


async def test_a_key_used_for_another_body_is_refused(lab: Lab) -> None:
    await lab.store.submit(job("a"), KEY)
    with pytest.raises(IdempotencyConflictError):
        await lab.store.submit(job("b"), KEY.model_copy(update={"fingerprint": "g"}))
    other = await lab.store.submit(job("c"), KEY.model_copy(update={"tenant": "b"}))
    assert (other.job_id, other.replayed) == ("c", False)


async def test_a_key_lives_as_long_as_its_job(lab: Lab) -> None:
    await lab.store.submit(job("a"), KEY)
    await lab.store.cancel("a")
    await lab.store.forget("a")
    assert (await lab.store.submit(job("b"), KEY)).job_id == "a"
    await lab.pass_time(RESULT_TTL_S + 1)
    await lab.store.reap()
    assert (await lab.store.submit(job("b"), KEY)).job_id == "b"


async def test_a_key_is_found_with_its_job_by_its_own_tenant(lab: Lab) -> None:
    await lab.store.submit(job("a"), KEY)
    assert await lab.store.find_key("a", "k") == (KEY, "a")
    assert await lab.store.find_key("b", "k") is None
    assert await lab.store.find_key("a", "other") is None


# ---- deadlines


async def test_a_job_past_its_deadline_is_never_claimed(lab: Lab) -> None:
    await lab.store.submit(job("late", deadline_ms=1000))
    await lab.store.submit(job("fine", deadline_ms=100_000))
    await lab.pass_time(2)
    (lease,) = await lab.store.claim("w", MODELS, 10)
    assert lease.job.id == "fine"
    assert lease.left_ms == pytest.approx(98_000, abs=1000)
    assert await status(lab, "late") is JobStatus.EXPIRED
    assert [event.type for event in await history(lab, "late")] == ["queued", "expired"]


async def test_the_reaper_ends_what_nobody_claims(lab: Lab) -> None:
    await lab.store.submit(job("late", deadline_ms=1000))
    await lab.pass_time(2)
    assert await lab.store.reap() == 0
    assert await status(lab, "late") is JobStatus.EXPIRED
    assert (await lab.store.backlog()).jobs == 0


async def test_a_running_job_ends_at_its_deadline_and_not_before(lab: Lab) -> None:
    await lab.store.submit(job("late", deadline_ms=5000))
    (lease,) = await lab.store.claim("w", MODELS, 10)
    assert not await lab.store.expire(lease)
    await lab.pass_time(6)
    assert await lab.store.expire(lease)
    assert not await lab.store.finish(lease, RESULT)
    assert await lab.store.heartbeat([lease]) == {lease.token}
    assert await status(lab, "late") is JobStatus.EXPIRED


# ---- history


async def test_the_history_is_told_as_it_happens(lab: Lab) -> None:
    await lab.store.submit(job("a"))
    following = asyncio.create_task(history(lab, "a"))
    (lease,) = await lab.store.claim("w", MODELS, 10)
    previews = [Preview(image=0, index=k, data=bytes([k, 255])) for k in range(2)]
    assert await lab.store.progress([Report(lease=lease, step=1, previews=(previews[0],))]) == frozenset()
    await lab.store.progress([Report(lease=lease, step=2, previews=(previews[1],))])
    await lab.store.finish(lease, RESULT)
    told = await following
    assert [event.type for event in told] == ["queued", "running", *["step"] * 4, "succeeded"]
    assert [event.step for event in told] == [0, 0, 1, 1, 2, 2, 4]
    assert [event.preview for event in told if event.preview] == previews


async def test_every_event_is_told_once_to_whoever_follows(lab: Lab) -> None:
    await lab.store.submit(job("a"))
    events = aiter(lab.store.events("a"))
    async with asyncio.timeout(30):
        told = [await anext(events)]
        (lease,) = await lab.store.claim("w", MODELS, 10)
        told.append(await anext(events))
        await lab.store.progress([Report(lease=lease, step=1)])
        told.append(await anext(events))
        await lab.store.finish(lease, RESULT)
        told += [event async for event in events]
    assert [event.type for event in told] == ["queued", "running", "step", "succeeded"]


async def test_the_history_is_replayed_after_any_event(lab: Lab) -> None:
    await lab.store.submit(job("a"))
    (lease,) = await lab.store.claim("w", MODELS, 10)
    await lab.store.progress([Report(lease=lease, step=1)])
    await lab.store.fail(lease, FAILURE)
    told = await history(lab, "a")
    assert len({event.id for event in told}) == len(told)
    for k, event in enumerate(told):
        assert await history(lab, "a", after=event.id) == told[k + 1 :]
    with pytest.raises(ValueError, match="event"):
        await history(lab, "a", after="junk")


async def test_acceptance_is_dated(lab: Lab) -> None:
    before = time.time()
    await lab.store.submit(job("a"))
    state = await lab.store.get("a")
    assert state is not None
    assert abs(state.job.created_s - before) < 3600


# ---- webhooks


async def test_an_ended_job_leaves_a_webhook_until_it_is_delivered(lab: Lab) -> None:
    await lab.store.submit(job("a", webhook_url="https://example.com/a", tenant="t"))
    await lab.store.submit(job("quiet"))
    (lease, other) = await lab.store.claim("w", MODELS, 10)
    assert await lab.store.claim_deliveries(10) == []
    await lab.store.finish(lease, RESULT)
    await lab.store.finish(other, RESULT)
    (delivery,) = await lab.store.claim_deliveries(10)
    assert (delivery.job_id, delivery.tenant, delivery.url) == ("a", "t", "https://example.com/a")
    assert (delivery.status, delivery.attempt) == (JobStatus.SUCCEEDED, 1)
    assert await lab.store.claim_deliveries(10) == [], "another worker holds it"
    assert await lab.store.delivered(delivery)
    assert not await lab.store.delivered(delivery)
    await lab.pass_time(LEASE_S + 1)
    assert await lab.store.claim_deliveries(10) == []


async def test_a_webhook_is_tried_again_later(lab: Lab) -> None:
    await lab.store.submit(job("a", webhook_url="https://example.com/a"))
    await lab.store.cancel("a")
    (first,) = await lab.store.claim_deliveries(1)
    assert await lab.store.retry_delivery(first, delay_s=5.0)
    assert await lab.store.claim_deliveries(1) == []
    await lab.pass_time(6)
    (second,) = await lab.store.claim_deliveries(1)
    assert second.attempt == 2
    await lab.pass_time(LEASE_S + 1)
    (third,) = await lab.store.claim_deliveries(1)
    assert third.attempt == 3, "a sender that fell silent is replaced"
    assert not await lab.store.delivered(second), "and is fenced"
    assert not await lab.store.retry_delivery(second, delay_s=1.0)
    assert await lab.store.delivered(third)


async def test_a_webhook_that_was_put_off_was_not_tried(lab: Lab) -> None:
    await lab.store.submit(job("a", webhook_url="https://example.com/a"))
    await lab.store.cancel("a")
    claimed = []
    for _ in range(3):
        claimed += await lab.store.claim_deliveries(1)
        assert await lab.store.retry_delivery(claimed[-1], delay_s=5.0, put_off=True)
        await lab.pass_time(6)
    assert [delivery.attempt for delivery in claimed] == [1, 1, 1]
    await lab.store.claim_deliveries(1)
    assert not await lab.store.delivered(claimed[-1]), "who put it off holds it no more"


async def test_a_webhook_tells_how_long_ago_its_job_ended(lab: Lab) -> None:
    await lab.store.submit(job("a", webhook_url="https://example.com/a"))
    await lab.store.cancel("a")
    await lab.pass_time(5000)
    (delivery,) = await lab.store.claim_deliveries(1)
    assert 5000 <= delivery.age_s < 5060


# ---- totals


async def test_what_was_accepted_is_what_ended(lab: Lab) -> None:
    for name in "abcd":
        await lab.store.submit(job(name), KEY.model_copy(update={"key": name}))
    await lab.store.submit(job("again"), KEY.model_copy(update={"key": "a"}))
    first, second = await lab.store.claim("w", MODELS, 2)
    await lab.store.finish(first, RESULT)
    await lab.store.finish(first, RESULT)
    await lab.store.fail(second, FAILURE)
    await lab.store.cancel("c")
    totals = {total.status: total.count for total in await lab.store.totals()}
    ended = {JobStatus.SUCCEEDED: 1, JobStatus.FAILED: 1, JobStatus.CANCELLED: 1}
    assert totals == {None: 4, **ended}
