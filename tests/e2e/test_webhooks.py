"""Webhooks: signed, retried, sent only where they may go, and never further."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock

import httpx
import openai
import pytest
from pydantic import ValidationError

from server import webhooks
from server.jobs import Delivery, Job, JobStatus
from server.request import DenoiseRequest
from server.settings import Settings
from server.signing import Signer
from server.stores.base import UnreadableJobError
from server.stores.memory_outbox import MemoryOutbox
from server.webhooks import Webhooks
from tests.support.live import live
from tests.support.serving import until
from tests.support.webhook_receiver import LOOPBACK, SECRET, receiver

verify = openai.OpenAI(api_key="none").webhooks.verify_signature
"""Of Standard Webhooks, by a library that developers have."""


@pytest.mark.parametrize("first", [500, 302])
def test_a_webhook_is_signed_and_sent_until_it_is_heard(toy_bundle: Path, first: int) -> None:
    """A redirect is a failure like any other."""
    with (
        receiver(first) as (origin, heard),
        live(toy_bundle, webhook_allow=(origin, LOOPBACK), secret=SECRET) as running,
        running.client() as client,
    ):
        job = client.post("/v1/jobs", json={"prompt": "one", "webhook_url": f"{origin}/done?x=1"}).json()
        until(lambda: len(heard) >= 2, "it was sent again")
    for headers, body in heard:
        assert {"type": "job.ended", "id": job["id"], "status": "succeeded"}.items() <= json.loads(body).items()
        verify(body, headers, secret=Signer(SECRET).webhook_secret("default"))
        for other in (Signer(SECRET).webhook_secret("another"), SECRET):
            with pytest.raises((openai.InvalidWebhookSignatureError, ValueError)):
                verify(body, headers, secret=other)
        assert headers["host"] == origin.removeprefix("http://")


def test_a_private_address_hears_nothing_unless_its_network_is_allowed(toy_bundle: Path) -> None:
    with (
        receiver() as (origin, heard),
        live(toy_bundle, webhook_allow=(origin,), secret=SECRET) as running,
        running.client() as client,
    ):
        job = client.post("/v1/jobs", json={"prompt": "one", "webhook_url": origin}).json()
        until(lambda: client.get(job["status_url"]).json()["status"] == "succeeded", "the job ended")

        def postponed() -> bool:
            waiting = running.service.store.jobs.outbox._waiting  # type: ignore[attr-defined]
            return any(entry.delivery.attempt >= 1 for entry in list(waiting.values()))

        until(postponed, "it was tried")
        assert heard == []


@pytest.mark.anyio
async def test_an_answer_without_an_end_is_heard_by_its_status() -> None:
    """And holds up no other webhook."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n")
        with suppress(ConnectionError):
            while not writer.is_closing():
                writer.write(b"and so on ")
                await writer.drain()
                await asyncio.sleep(0.01)

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    origin = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    outbox = MemoryOutbox(30.0, time.monotonic)
    store: Any = SimpleNamespace(
        claim_deliveries=AsyncMock(side_effect=outbox.claim),
        delivered=AsyncMock(side_effect=outbox.delivered),
    )
    request = DenoiseRequest(model="m", prompt="p", seed=1, guidance_scale=2.0, steps=4, width=8, height=8)
    outbox.add(Job(id="a", request=request, cost_s=0, webhook_url=origin), JobStatus.SUCCEEDED, 1.0)
    sending = asyncio.create_task(Webhooks((origin, LOOPBACK), Signer(SECRET), store).run())
    async with asyncio.timeout(60):
        while not store.delivered.called:  # noqa: ASYNC110 - a mock has no event
            await asyncio.sleep(0.01)
    sending.cancel()
    server.close()


@asynccontextmanager
async def silence() -> AsyncIterator[tuple[str, list[asyncio.StreamWriter]]]:
    """An origin that never answers, and the connections that were made to it."""
    asked: list[asyncio.StreamWriter] = []

    async def hang(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(writer)

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked
    finally:
        server.close()
        for writer in asked:
            writer.close()


@pytest.mark.anyio
@pytest.mark.parametrize(("silent", "timeout_s"), [(1, 3600.0), (200, 1.0)], ids=["one", "many"])
async def test_an_origin_that_hangs_holds_up_no_other(
    monkeypatch: pytest.MonkeyPatch, silent: int, timeout_s: float
) -> None:
    """However many messages it is to get, and whether or not the first of them has timed out."""
    monkeypatch.setattr(webhooks, "TIMEOUT_S", timeout_s)
    outbox = MemoryOutbox(3600.0, time.monotonic)
    store: Any = SimpleNamespace(
        claim_deliveries=AsyncMock(side_effect=outbox.claim),
        delivered=AsyncMock(side_effect=outbox.delivered),
        retry_delivery=AsyncMock(side_effect=outbox.retry),
    )
    request = DenoiseRequest(model="m", prompt="p", seed=1, guidance_scale=2.0, steps=4, width=8, height=8)
    with receiver() as (origin, heard):
        async with silence() as (hanging, asked):
            for name in [f"silent-{k}" for k in range(silent)] + [f"heard-{k}" for k in range(20)]:
                url = hanging if name.startswith("silent") else origin
                outbox.add(Job(id=name, request=request, cost_s=0, webhook_url=url), JobStatus.SUCCEEDED, 1.0)
            sending = asyncio.create_task(Webhooks((origin, hanging, LOOPBACK), Signer(SECRET), store).run())
            async with asyncio.timeout(60):
                while store.delivered.call_count < 20:  # noqa: ASYNC110 - a mock has no event
                    await asyncio.sleep(0.01)
            sending.cancel()
            with suppress(asyncio.CancelledError):
                await sending
            assert {json.loads(body)["id"] for _, body in heard} == {f"heard-{k}" for k in range(20)}
            assert 1 <= len(asked) <= max(1, silent // 2), "the others were put off"


@asynccontextmanager
async def sending_to_silence(
    monkeypatch: pytest.MonkeyPatch, age_s: float
) -> AsyncIterator[tuple[MemoryOutbox, int]]:
    """An outbox whose 20 messages, as old as that, were each claimed once; and how many of them were sent.

    Those that are sent at once time out, and the next one is still under way.
    """
    now, sent = [0.0], []
    outbox = MemoryOutbox(3600.0, lambda: now[0])
    store: Any = SimpleNamespace(
        claim_deliveries=AsyncMock(side_effect=outbox.claim),
        delivered=AsyncMock(side_effect=outbox.delivered),
        retry_delivery=AsyncMock(side_effect=outbox.retry),
    )

    async def post(*_: Any) -> int:
        sent.append(1)
        if len(sent) > webhooks._AT_ONCE:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
        raise TimeoutError

    monkeypatch.setattr(Webhooks, "_post", post)
    request = DenoiseRequest(model="m", prompt="p", seed=1, guidance_scale=2.0, steps=4, width=8, height=8)
    for k in range(20):
        job = Job(id=f"{k}", request=request, cost_s=0, webhook_url="https://silent.example")
        outbox.add(job, JobStatus.SUCCEEDED, 1.0)
    now[0] += age_s
    sending = asyncio.create_task(Webhooks(("https://silent.example",), Signer(SECRET), store).run())
    async with asyncio.timeout(60):
        while store.delivered.call_count + store.retry_delivery.call_count < 19:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.001)
    yield outbox, len(sent)
    sending.cancel()


@pytest.mark.anyio
async def test_a_message_that_was_put_off_keeps_its_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    async with sending_to_silence(monkeypatch, 1.0) as (outbox, sent):
        assert sent < 20
        assert sum(entry.delivery.attempt for entry in outbox._waiting.values()) == sent


@pytest.mark.anyio
async def test_a_message_that_is_a_day_old_is_given_up_sent_or_put_off(monkeypatch: pytest.MonkeyPatch) -> None:
    async with sending_to_silence(monkeypatch, webhooks.MAX_AGE_S + 1) as (outbox, sent):
        assert sent < 20
        assert len(outbox._waiting) == 1, "which is under way"


@pytest.mark.anyio
async def test_hosts_are_looked_up_on_threads_of_their_own() -> None:
    """Which slow names keep from nobody, and nobody from them."""
    free = threading.Event()
    with receiver() as (origin, heard), ThreadPoolExecutor(1) as busy:
        asyncio.get_running_loop().set_default_executor(busy)
        waiting = asyncio.create_task(asyncio.to_thread(free.wait, 60))
        outbox = MemoryOutbox(30.0, time.monotonic)
        request = DenoiseRequest(model="m", prompt="p", seed=1, guidance_scale=2.0, steps=4, width=8, height=8)
        outbox.add(Job(id="a", request=request, cost_s=0, webhook_url=origin), JobStatus.SUCCEEDED, 1.0)
        store: Any = SimpleNamespace(
            claim_deliveries=AsyncMock(side_effect=outbox.claim), delivered=AsyncMock(side_effect=outbox.delivered)
        )
        await asyncio.sleep(0)
        await Webhooks((origin, LOOPBACK), Signer(SECRET), store).flush()
        free.set()
        await waiting
        assert len(heard) == 1


@pytest.mark.anyio
async def test_a_job_of_another_version_is_told_of_later_and_holds_up_no_other() -> None:
    """Whoever can read it says where its files are."""
    with receiver() as (origin, heard):
        outbox = MemoryOutbox(30.0, time.monotonic)
        request = DenoiseRequest(model="m", prompt="p", seed=1, guidance_scale=2.0, steps=4, width=8, height=8)
        for name in ("foreign", "own"):
            outbox.add(Job(id=name, request=request, cost_s=0, webhook_url=origin), JobStatus.FAILED, 1.0)

        async def get(job_id: str) -> None:
            if job_id == "foreign":
                raise UnreadableJobError("this version cannot read the job's added_later")

        store: Any = SimpleNamespace(
            claim_deliveries=AsyncMock(side_effect=outbox.claim),
            delivered=AsyncMock(side_effect=outbox.delivered),
            retry_delivery=AsyncMock(side_effect=outbox.retry),
            get=get,
        )
        links: Any = object()
        await Webhooks((origin, LOOPBACK), Signer(SECRET), store, links).flush()
        assert [json.loads(body)["id"] for _, body in heard] == ["own"]
        assert store.retry_delivery.call_args.args[0].job_id == "foreign"


def test_a_server_that_ends_tells_of_what_it_just_finished(toy_bundle: Path) -> None:
    with receiver(200) as (origin, heard):
        allowed = (origin, LOOPBACK)
        with live(toy_bundle, webhook_allow=allowed, secret=SECRET) as running, running.client() as client:
            wish, patient = {"prompt": "one", "webhook_url": origin}, {"prefer": "wait=60"}
            jobs = [client.post("/v1/jobs", json=wish, headers=patient).json() for _ in range(3)]
        assert {json.loads(body)["id"] for _, body in heard} == {job["id"] for job in jobs}


@pytest.mark.parametrize(
    "other",
    [
        "http://hooks.example.com.evil.test/",
        "http://u@hooks.example.com/",
        "https://hooks.example.com/",
        "http://hooks.example.com:81/",
    ],
)
def test_other_origins_are_refused(toy_bundle: Path, other: str) -> None:
    settings = {"webhook_allow": ("http://hooks.example.com",), "secret": SECRET}
    with live(toy_bundle, **settings) as running, running.client() as client:
        refused = client.post("/v1/jobs", json={"prompt": "one", "webhook_url": other})
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "webhook_not_allowed")


@pytest.mark.parametrize("allow", ["https://x.example/path", "ftp://x.example", "nonsense"])
def test_what_is_no_origin_and_no_network_is_a_wrong_setting(allow: str) -> None:
    with pytest.raises(ValidationError, match="webhook_allow"):
        Settings(webhook_allow=(allow,), secret=SECRET)


def test_webhooks_need_a_secret() -> None:
    with pytest.raises(ValidationError, match="HALFSTEP_SECRET"):
        Settings(webhook_allow=("https://x.example",))


def delivery(name: str = "a", attempt: int = 1, **fields: Any) -> Delivery:
    told = {"tenant": "t", "status": JobStatus.SUCCEEDED, "ended_s": 1.0, "age_s": 1.0, "claim": 1}
    return Delivery.model_validate({"job_id": name, "attempt": attempt, **told, **fields})


@pytest.mark.anyio
@pytest.mark.parametrize(("attempt", "delay_s"), [(1, 2.0), (2, 4.0), (3, 8.0), (11, 2048.0), (12, None)])
async def test_a_message_is_tried_after_twice_as_long_each_time_and_given_up_in_the_end(
    attempt: int, delay_s: float | None
) -> None:
    """Here, because its origin is allowed no more: it hears nothing."""
    with receiver() as (origin, heard):
        due = [[delivery(attempt=attempt, url=origin)], []]
        store: Any = SimpleNamespace(
            claim_deliveries=AsyncMock(side_effect=due), delivered=AsyncMock(), retry_delivery=AsyncMock()
        )
        await Webhooks(("http://allowed.example", LOOPBACK), Signer(SECRET), store).flush()
    assert heard == []
    assert store.delivered.call_count == int(delay_s is None)
    assert [call.args[1] for call in store.retry_delivery.call_args_list] == [delay_s] * int(delay_s is not None)


@pytest.mark.parametrize(("age_s", "delay_s"), [(0.1, 2.0), (70.0, 70.0), (80_000.0, 3600.0)])
def test_a_message_that_was_put_off_waits_as_long_again(age_s: float, delay_s: float) -> None:
    late = delivery(attempt=3, url="https://silent.example", age_s=age_s)
    assert webhooks._delay_s(late, put_off=True) == delay_s


@pytest.mark.anyio
async def test_no_proxy_of_the_environment_hears_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with receiver() as (origin, heard), receiver() as (proxy, passed):
        monkeypatch.setenv("http_proxy", proxy)
        store: Any = SimpleNamespace(
            claim_deliveries=AsyncMock(side_effect=[[delivery(url=origin)], []]), delivered=AsyncMock()
        )
        await Webhooks((origin, LOOPBACK), Signer(SECRET), store).flush()
    assert (len(heard), len(passed)) == (1, 0)


@pytest.mark.anyio
async def test_the_certificate_is_asked_of_the_name_whose_address_is_connected_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(204)

    client = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    monkeypatch.setattr(webhooks, "_client", lambda: client)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: [(0, 0, 0, "", ("1.1.1.1", 0))])
    due = [[delivery(url="https://hooks.example:444/done")], []]
    store: Any = SimpleNamespace(claim_deliveries=AsyncMock(side_effect=due), delivered=AsyncMock())
    await Webhooks(("https://hooks.example:444",), Signer(SECRET), store).flush()
    (request,) = asked
    assert str(request.url) == "https://1.1.1.1:444/done"
    assert (request.headers["host"], request.extensions["sni_hostname"]) == ("hooks.example:444", "hooks.example")


@pytest.mark.anyio
async def test_an_origin_that_answers_again_hears_several_messages_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    together = asyncio.Barrier(2)

    async def post(self: Webhooks, client: Any, told: Delivery) -> int:
        if told.job_id == "late":
            raise TimeoutError
        if told.job_id != "back":
            await together.wait()
        return 204

    monkeypatch.setattr(Webhooks, "_post", post)
    store: Any = SimpleNamespace(delivered=AsyncMock(), retry_delivery=AsyncMock())
    hooks, client = Webhooks(("https://hooks.example",), Signer(SECRET), store), cast(Any, None)
    async with asyncio.timeout(60):
        for names in (["late"], ["back"], ["one", "other"]):
            await asyncio.gather(*(hooks._deliver(client, delivery(k, url="https://hooks.example")) for k in names))
    assert {call.args[0].job_id for call in store.delivered.call_args_list} == {"back", "one", "other"}
