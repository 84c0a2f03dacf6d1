"""What the API owes its callers whatever the store: repeats are free, tenants leave room, requests are counted."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from server.auth import Keyring
from server.errors import OverloadedError
from server.jobs import Job, Report
from server.request import DenoiseRequest
from server.service import JobOptions
from tests.contract.asking import MODELS, PATIENCE_S, REQUEST, Serve, asking, away, counted, keyed, outcome
from tests.contract.lab import FAILURE, RESULT, RESULT_TTL_S, Lab
from tests.support.job_calls import JOBS
from tests.support.keys import bearer, write_key_file
from tests.support.offline import ROW_STEP_S

pytestmark = pytest.mark.anyio


# ---- repeats


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        pytest.param({"max_queue_s": 0.001}, (503, "queue_full"), id="queue"),
        pytest.param({"quota": "3/day"}, (429, "quota_exceeded"), id="quota"),
        pytest.param({"rate_limit": "1/day"}, (429, "rate_limited"), id="rate"),
    ],
)
async def test_a_repeat_passes_where_new_work_is_refused(
    serve: Serve, settings: dict[str, Any], refusal: tuple[int, str]
) -> None:
    async with asking(serve(**settings)) as client:
        body = {"prompt": "one", "n": 3}
        first = outcome(await client.post(JOBS, json=body, headers=keyed("a")))
        assert first[0] == 202
        for _ in range(3):
            assert outcome(await client.post(JOBS, json=body, headers=keyed("a"))) == first
        assert outcome(await client.post(JOBS, json=body, headers=keyed("b"))) == refusal
        assert outcome(await client.post(JOBS, json=body)) == refusal


async def test_repeats_leave_the_rate_to_what_is_new(serve: Serve) -> None:
    async with asking(serve(rate_limit="2/day")) as client:
        for _ in range(5):
            assert (await client.post(JOBS, json={"prompt": "one"}, headers=keyed("a"))).status_code == 202
        assert (await client.post(JOBS, json={"prompt": "two"})).status_code == 202
        assert (await client.post(JOBS, json={"prompt": "two"})).status_code == 429


async def test_a_repeat_is_answered_by_a_server_about_to_end(serve: Serve) -> None:
    service = serve()
    async with asking(service) as client:
        first = outcome(await client.post(JOBS, json={"prompt": "one"}, headers=keyed("a")))
        service.draining.set()
        assert outcome(await client.post(JOBS, json={"prompt": "one"}, headers=keyed("a"))) == first
        assert outcome(await client.post(JOBS, json={"prompt": "one"}))[0] == 503


async def test_fifty_at_once_under_one_key_are_one_job_and_charged_once(serve: Serve) -> None:
    service = serve(quota="1/day")
    async with asking(service) as client:
        posts = (client.post(JOBS, json={"prompt": "one"}, headers=keyed("a")) for _ in range(50))
        answers = {outcome(answer) for answer in await asyncio.gather(*posts)}
        assert [status for status, _ in answers] == [202]
        assert (await service.store.backlog()).jobs == 1
        assert outcome(await client.post(JOBS, json={"prompt": "one"}))[1] == "quota_exceeded"


async def test_another_body_under_a_known_key_is_refused_before_anything_else(serve: Serve) -> None:
    async with asking(serve(max_queue_s=0.001)) as client:
        await client.post(JOBS, json={"prompt": "one"}, headers=keyed("a"))
        answer = await client.post(JOBS, json={"prompt": "two"}, headers=keyed("a"))
        assert outcome(answer) == (422, "idempotency_key_reuse")


# ---- room and shares


async def test_a_tenant_fills_its_share_and_no_more(serve: Serve, lab: Lab, tmp_path: Path) -> None:
    keys = write_key_file(tmp_path / "keys.json")
    service = serve(Keyring(tmp_path / "keys.json"), max_queued_rows=20, tenant_share=0.5)
    async with asking(service) as client:

        async def post(tenant: str, n: int = 1) -> tuple[int, str]:
            body = {"prompt": "one", "n": n}
            return outcome(await client.post(JOBS, json=body, headers=bearer(keys[tenant])))

        assert (await post("a", 4))[0] == (await post("a", 6))[0] == 202
        assert await post("a") == (429, "tenant_queue_full")
        assert (await post("b", 10))[0] == 202
        assert await post("b") == (429, "tenant_queue_full")
        assert await post("c") == (503, "queue_full")
        for lease in await lab.store.claim("w", MODELS, 20):
            if lease.job.tenant == "a":
                await lab.store.finish(lease, RESULT)
        assert (await post("a"))[0] == 202
        assert await post("b") == (429, "tenant_queue_full")


async def test_without_keys_the_whole_queue_is_everyones(serve: Serve) -> None:
    async with asking(serve(max_queued_rows=10, tenant_share=0.1)) as client:
        for _ in range(5):
            assert (await client.post(JOBS, json={"prompt": "one", "n": 2})).status_code == 202
        assert outcome(await client.post(JOBS, json={"prompt": "one"})) == (503, "queue_full")


async def test_of_a_burst_no_more_come_in_than_there_is_room_for(serve: Serve, lab: Lab) -> None:
    """All look at the queue before the first is in it."""
    service = serve(max_queued_rows=10)
    backlog, asked = lab.store.backlog, asyncio.Event()
    waiting = 0

    async def slow(*args: Any, **kwargs: Any) -> Any:
        nonlocal waiting
        found = await backlog(*args, **kwargs)
        waiting += 1
        if waiting == 8:
            asked.set()
        await asked.wait()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab.store, "backlog", slow)
        async with asking(service) as client:
            posts = (client.post(JOBS, json={"prompt": "one", "n": 4}) for _ in range(8))
            answers = [outcome(answer) for answer in await asyncio.gather(*posts)]
    assert sorted(status for status, _ in answers) == [202] * 2 + [503] * 6
    assert (await lab.store.backlog()).rows == 8


async def test_of_a_burst_each_tenant_has_its_own_share(serve: Serve, lab: Lab, tmp_path: Path) -> None:
    keys = write_key_file(tmp_path / "keys.json")
    service = serve(Keyring(tmp_path / "keys.json"), max_queued_rows=40, tenant_share=0.25)
    backlog, both, looks = lab.store.backlog, asyncio.Event(), list[bool]()

    async def together(*args: Any, **kwargs: Any) -> Any:
        looks.append(True)
        if len(looks) == 2:
            both.set()
        await both.wait()
        return await backlog(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab.store, "backlog", together)
        async with asking(service) as client:
            body = {"prompt": "one", "n": 10}
            posts = (client.post(JOBS, json=body, headers=bearer(keys[tenant])) for tenant in "ab")
            answers = [outcome(answer) for answer in await asyncio.gather(*posts)]
    assert [status for status, _ in answers] == [202] * 2


async def test_what_did_not_get_in_takes_no_room(serve: Serve, lab: Lab) -> None:
    async with asking(serve(max_queued_rows=10)) as client:
        body = {"prompt": "one", "n": 10}
        with pytest.MonkeyPatch.context() as outage:
            outage.setattr(lab.store, "submit", away)
            assert outcome(await client.post(JOBS, json=body)) == (503, "store_unavailable")
        assert (await client.post(JOBS, json=body)).status_code == 202


@pytest.mark.parametrize(("model", "room"), [("another", True), ("toy-digits", False)])
async def test_room_is_taken_by_what_enters_for_the_same_workers(serve: Serve, model: str, room: bool) -> None:
    service, wanted = serve(max_queued_rows=10), REQUEST.model_copy(update={"n": 10})
    first, second = (
        Job(id=name, request=wanted.model_copy(update={"model": of}), cost_s=0.1)
        for name, of in (("first", model), ("second", wanted.model))
    )
    with service._entrance._arrivals.entering(first), nullcontext() if room else pytest.raises(OverloadedError):
        await service._entrance.check(second)


async def test_nothing_is_decoded_for_a_deadline_that_cannot_be_met(serve: Serve) -> None:
    service, decoded = serve(), list[bool]()

    def decode() -> DenoiseRequest:
        decoded.append(True)
        return REQUEST

    async with service.accepted(REQUEST):
        with pytest.raises(OverloadedError) as refused:
            await service.decoded(REQUEST, decode, JobOptions(deadline_ms=1))
        assert (refused.value.code, decoded) == ("deadline_unmeetable", [])
        assert await service.decoded(REQUEST, decode, JobOptions(deadline_ms=60_000)) == REQUEST


# ---- counts


async def test_jobs_are_counted_as_requests_one_for_one(serve: Serve, lab: Lab) -> None:
    service = serve(rate_limit="6/day")
    ids = []
    async with asking(service) as client:
        for name in "abcdef":
            body = {"prompt": "one", **({"deadline_ms": 1000} if name == "f" else {})}
            ids.append(outcome(await client.post(JOBS, json=body, headers=keyed(name)))[1])
            await client.post(JOBS, json=body, headers=keyed(name))
        assert (await client.delete(f"{JOBS}/{ids[4]}")).status_code == 200
        assert (await client.post(JOBS, json={"prompt": "one"})).status_code == 429
    await lab.pass_time(2)
    await lab.store.reap()
    leases = await lab.store.claim("w", MODELS, 3)
    await lab.store.finish(leases[0], RESULT)
    await lab.store.finish(leases[1], RESULT)
    await lab.store.fail(leases[2], FAILURE)
    await service.counts.look()
    await service.counts.look()
    assert counted(service, "halfstep_requests_accepted_total") == {"text_to_image": 6}
    ends = {"succeeded": 2, "failed": 1, "cancelled": 1, "expired": 1}
    assert counted(service, "halfstep_requests_total") == ends
    assert counted(service, "halfstep_requests_rejected_total") == {"rate_limited": 1}
    assert counted(service, "halfstep_request_seconds_count") == {"text_to_image": 2}
    assert counted(service, "halfstep_request_seconds_sum")["text_to_image"] >= 4
    assert service.counts.followed == {ids[3]}


async def test_an_end_that_nobody_saw_is_counted_all_the_same(serve: Serve, lab: Lab) -> None:
    service = serve()
    async with asking(service) as client:
        job_id = outcome(await client.post(JOBS, json={"prompt": "one"}))[1]
    await lab.store.cancel(job_id)
    await lab.pass_time(10 * RESULT_TTL_S)
    await lab.store.reap()
    await service.counts.look()
    assert counted(service, "halfstep_requests_total") == {"unknown": 1}
    assert not service.counts.followed


# ---- AUTOMATIC1111's clients


async def test_a1111_clients_see_the_time_left_and_the_keys_they_read(serve: Serve, lab: Lab) -> None:
    async with asking(serve()) as client:

        async def left_s() -> float:
            return float((await client.get("/sdapi/v1/progress")).json()["eta_relative"])

        wish = {"prompt": "one", "steps": 4, "batch_size": 2, "n_iter": 3}
        draws = asyncio.create_task(client.post("/sdapi/v1/txt2img", json=wish))
        (lease,) = await lab.store.claim("w", MODELS, 6, wait_s=PATIENCE_S)
        async with asyncio.timeout(PATIENCE_S):
            while await left_s() == 0:  # noqa: ASYNC110 - a worker may have the job before its request goes on
                await asyncio.sleep(0.01)
        assert await left_s() == pytest.approx(6 * 4 * ROW_STEP_S)
        await lab.store.progress([Report(lease=lease, step=3)])
        assert await left_s() == pytest.approx(6 * 1 * ROW_STEP_S)
        await lab.store.finish(lease, RESULT.model_copy(update={"images": RESULT.images * 6}))
        answer = (await asyncio.wait_for(draws, PATIENCE_S)).json()
        assert await left_s() == 0
    info, parameters = json.loads(answer["info"]), answer["parameters"]
    for told in (info, parameters):
        assert (told["batch_size"], told["n_iter"]) == (2, 3)
    assert (info["negative_prompt"], info["all_negative_prompts"]) == ("", [""] * 6)
    assert (info["subseed"], info["all_subseeds"]) == (-1, [-1] * 6)
    assert (info["index_of_first_image"], info["styles"]) == (0, [])
    created = time.mktime(time.strptime(info["job_timestamp"], "%Y%m%d%H%M%S"))
    assert 0 <= lease.job.created_s - created < 1
