"""What callers keep when an outage, a result that is lost or the end of the process comes in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.requests import Request

from server.api.disconnection import cancelled_when_gone
from server.errors import OverloadedError
from server.jobs import JobEvent, JobStatus
from server.storage import ResultStoreError
from server.stores.base import StoreUnavailableError, UnreadableJobError
from tests.contract.asking import MODELS, PATIENCE_S, REQUEST, Serve, asking, away, counted, keyed, outcome
from tests.contract.lab import FAILURE, RESULT, Lab, status
from tests.support.job_calls import JOBS

pytestmark = pytest.mark.anyio


async def test_an_end_that_an_outage_hid_is_counted_after_it(
    serve: Serve, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve()
    with monkeypatch.context() as outage:
        async with service.accepted(REQUEST):
            outage.setattr(lab.store, "cancel", away)
    (lease,) = await lab.store.claim("w", MODELS, 1)
    await lab.store.finish(lease, RESULT)
    await service.counts.look()
    assert counted(service, "halfstep_requests_accepted_total") == {"text_to_image": 1}
    assert counted(service, "halfstep_requests_total") == {"succeeded": 1}


async def test_what_an_outage_kept_from_being_cancelled_is_cancelled_after_it(
    serve: Serve, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve()
    with monkeypatch.context() as outage:
        async with service.accepted(REQUEST) as job_id:
            outage.setattr(lab.store, "cancel", away)
        with pytest.raises(StoreUnavailableError):
            await service.counts.look()
    await service.counts.look()
    state = await lab.store.get(job_id)
    assert state is not None
    assert state.status is JobStatus.CANCELLED
    assert await lab.store.claim("w", MODELS, 1) == []


async def test_a_client_that_leaves_in_an_outage_has_its_job_cancelled_after_it(
    serve: Serve, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, asked = serve(), asyncio.Event()

    async def gone() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def cancel(job_id: str) -> Any:
        asked.set()
        await away()

    async with service.accepted(REQUEST) as job_id:
        with monkeypatch.context() as outage:
            outage.setattr(lab.store, "cancel", cancel)
            async with cancelled_when_gone(service, Request({"type": "http"}, gone), job_id):
                await asyncio.wait_for(asked.wait(), PATIENCE_S)
        await service.counts.look()
        state = await lab.store.get(job_id)
        assert state is not None
        assert state.status is JobStatus.CANCELLED


async def test_a_job_whose_acceptance_was_never_heard_of_is_cancelled_unless_it_has_a_key(
    serve: Serve, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = lab.store.submit

    async def lost(*args: Any) -> Any:
        await submit(*args)
        raise StoreUnavailableError("the answer is lost")

    service = serve()
    async with asking(service) as client:
        with monkeypatch.context() as outage:
            outage.setattr(lab.store, "submit", lost)
            assert outcome(await client.post(JOBS, json={"prompt": "one"})) == (503, "store_unavailable")
            assert (await client.post(JOBS, json={"prompt": "two"}, headers=keyed("a"))).status_code == 503
        await service.counts.look()
        (lease,) = await lab.store.claim("w", MODELS, 4)
        assert lease.job.request.prompt == "two"
        again = await client.post(JOBS, json={"prompt": "two"}, headers=keyed("a"))
        assert outcome(again) == (202, lease.job.id)


@pytest.mark.parametrize("prefer", [{}, {"prefer": "wait=30"}])
async def test_a_job_that_an_outage_hides_after_its_acceptance_is_named_all_the_same(
    serve: Serve, lab: Lab, monkeypatch: pytest.MonkeyPatch, prefer: dict[str, str]
) -> None:
    """An error would have it sent again, and made twice."""
    async with asking(serve()) as client:
        with monkeypatch.context() as outage:
            outage.setattr(lab.store, "wait", away)
            outage.setattr(lab.store, "get", away)
            answer = await client.post(JOBS, json={"prompt": "one"}, headers=prefer)
        assert answer.status_code == 202
        body = answer.json()
        (lease,) = await lab.store.claim("w", MODELS, 4)
        url = f"http://test{JOBS}/{lease.job.id}"
        links = {"status_url": url, "events_url": f"{url}/events", "cancel_url": url}
        assert body == {"id": lease.job.id, "object": "job", "status": "queued", **links}
        assert answer.headers["location"] == url
        assert outcome(await client.get(url)) == (200, lease.job.id)


@pytest.mark.parametrize("lost", [ResultStoreError("away"), UnreadableJobError("another version wrote it")])
async def test_an_ended_job_whose_result_cannot_be_told_is_named_all_the_same(
    serve: Serve, lab: Lab, monkeypatch: pytest.MonkeyPatch, lost: Exception
) -> None:
    async def untold(*_: Any) -> Any:
        raise lost

    service = serve()
    monkeypatch.setattr(service, "links_of", untold)
    async with asking(service) as client:
        waits = asyncio.create_task(client.post(JOBS, json={"prompt": "one"}, headers={"prefer": "wait=60"}))
        (lease,) = await lab.store.claim("w", MODELS, 1, wait_s=PATIENCE_S)
        await lab.store.finish(lease, RESULT)
        answer = await asyncio.wait_for(waits, PATIENCE_S)
    assert outcome(answer) == (202, lease.job.id)
    assert answer.json()["status"] == "succeeded"


async def test_a_process_about_to_end_says_the_id_of_a_job_that_others_finish(
    serve: Serve, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab.store, "outlives_process", True)
    service = serve()
    events, sent = service.store.events, asyncio.Event()

    async def watched(job_id: str, after: str | None = None) -> AsyncIterator[JobEvent]:
        async for event in events(job_id, after):
            yield event
            sent.set()  # as the next is asked for

    monkeypatch.setattr(service.store, "events", watched)
    async with asking(service) as client:
        waits = asyncio.create_task(client.post(JOBS, json={"prompt": "one"}, headers={"prefer": "wait=60"}))
        (lease,) = await lab.store.claim("w", MODELS, 1, wait_s=PATIENCE_S)
        follows = asyncio.create_task(client.get(f"{JOBS}/{lease.job.id}/events"))
        await asyncio.wait_for(sent.wait(), PATIENCE_S)
        service.draining.set()
        assert outcome(await asyncio.wait_for(waits, PATIENCE_S)) == (202, lease.job.id)
        told = (await asyncio.wait_for(follows, PATIENCE_S)).text
    assert "event: queued" in told
    assert "event: completed" not in told


async def test_a_process_about_to_end_waits_for_a_request_that_it_is_letting_in(
    serve: Serve, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    backlog, looks, told = lab.store.backlog, asyncio.Event(), asyncio.Event()

    async def slow(*args: Any, **kwargs: Any) -> Any:
        looks.set()
        await told.wait()
        return await backlog(*args, **kwargs)

    monkeypatch.setattr(lab.store, "outlives_process", True)
    monkeypatch.setattr(lab.store, "backlog", slow)
    service = serve()

    async def ask() -> bool:
        async with service.accepted(REQUEST):
            return await service.idle()

    asks = asyncio.create_task(ask())
    await looks.wait()
    service.draining.set()
    assert not await service.idle()
    told.set()
    assert not await asks, "accepted, it is waited for"
    assert await service.idle()
    with pytest.raises(OverloadedError):
        await ask()
    assert await service.idle(), "what is turned away is not waited for"


async def test_a_job_that_ends_with_its_process_is_waited_for_and_another_left_to_others(
    serve: Serve, lab: Lab
) -> None:
    service, left = serve(), lab.store.outlives_process
    async with asking(service) as client:
        job_id = outcome(await client.post(JOBS, json={"prompt": "one"}))[1]
    assert await service.idle() is left
    assert await service.abandon(FAILURE) == int(not left)
    assert await service.idle()
    assert await status(lab, job_id) is (JobStatus.QUEUED if left else JobStatus.FAILED)


async def test_a_store_that_came_back_empty_is_away_to_those_who_wait(
    serve: Serve, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def forgotten(job_id: str) -> Any:
        raise KeyError(job_id)

    monkeypatch.setattr(lab.store, "wait", forgotten)
    async with asking(serve()) as client:
        answer = await client.post("/v1/images/generations", json={"prompt": "one"})
        assert outcome(answer) == (503, "store_unavailable")
        drawn = await client.post("/sdapi/v1/txt2img", json={"prompt": "one"})
        assert drawn.status_code == 503


async def test_a_job_of_another_version_is_told_apart_from_a_fault(
    serve: Serve, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unreadable(_: str) -> Any:
        raise UnreadableJobError("this version cannot read the job's added_later")

    service = serve()
    async with asking(service) as client:
        job_id = outcome(await client.post(JOBS, json={"prompt": "one"}))[1]
        monkeypatch.setattr(lab.store, "get", unreadable)
        assert outcome(await client.get(f"{JOBS}/{job_id}")) == (500, "unreadable_job")
