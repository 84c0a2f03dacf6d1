"""Files of edits are decoded a few at a time, and not at all where the edit would be refused."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api import job_submission
from server.app import create_app
from server.decoding import DECODES_AT_ONCE, MAX_WAITING
from server.errors import OverloadedError
from server.job_requests import with_files_of
from server.request import DenoiseRequest
from server.service import Service
from server.settings import Settings
from tests.support.job_calls import JOBS, error, submit
from tests.support.live import Live, live
from tests.support.offline import offline_service
from tests.support.pictures import file_of, photo

NO_IMAGE = b"no image, which shows once it is decoded"
TEXT = base64.b64encode(NO_IMAGE).decode()
POSTS: dict[str, Callable[[httpx.Client], httpx.Response]] = {
    "openai": lambda api: api.post("/v1/images/edits", data={"prompt": "one"}, files={"image": NO_IMAGE}),
    "jobs": lambda api: api.post(JOBS, json={"prompt": "one", "task": "edit", "image": TEXT}),
    "a1111": lambda api: api.post("/sdapi/v1/img2img", json={"prompt": "one", "init_images": [TEXT]}),
}
WANTED = DenoiseRequest(model="toy-digits", prompt="one", seed=1, guidance_scale=2.0, steps=4, width=64, height=64)


def holding(free: threading.Event) -> Callable[[], DenoiseRequest]:
    """Decodes once it may."""

    def decode() -> DenoiseRequest:
        free.wait(60)
        return WANTED

    return decode


def code(answer: httpx.Response) -> tuple[int, Any]:
    """The status and code of either shape of error."""
    told = answer.json()["error"]
    return answer.status_code, told if isinstance(told, str) else told["code"]


def fill(running: Live, api: httpx.Client) -> None:
    """The queue, with jobs that do not end."""
    running.bench.hold()
    for _ in range(running.service.settings.max_queued_rows // 10):
        submit(api, n=10)


@pytest.mark.parametrize("post", POSTS.values(), ids=POSTS)
def test_what_has_no_room_is_refused_undecoded(
    toy_bundle: Path, post: Callable[[httpx.Client], httpx.Response]
) -> None:
    with live(toy_bundle, max_queued_rows=10, max_queue_s=1000.0) as running, running.client() as api:
        assert code(post(api))[1] == "invalid_image"
        fill(running, api)
        assert code(post(api)) == (503, "queue_full")
        running.service.draining.set()
        assert code(post(api)) == (503, "draining")


def test_an_edit_sent_again_under_its_key_needs_no_room(toy_bundle: Path) -> None:
    body = {"prompt": "one", "task": "edit", "image": base64.b64encode(file_of(photo())).decode()}
    key = {"idempotency-key": "edit"}
    with live(toy_bundle, max_queued_rows=11, max_queue_s=1000.0) as running, running.client() as api:
        running.bench.hold()
        first = api.post(JOBS, json=body, headers=key)
        fill(running, api)
        assert error(api.post(JOBS, json=body)) == (503, "queue_full")
        assert api.post(JOBS, json=body, headers=key).json()["id"] == first.json()["id"]


@pytest.mark.parametrize("post", POSTS.values(), ids=POSTS)
def test_what_is_beyond_a_quota_is_refused_undecoded(
    toy_bundle: Path, post: Callable[[httpx.Client], httpx.Response]
) -> None:
    with live(toy_bundle, quota="1/day") as running, running.client() as api:
        assert code(post(api))[1] == "invalid_image", "and spends nothing"
        submit(api)
        assert code(post(api)) == (429, "quota_exceeded")


def test_an_edit_sent_again_under_its_key_is_not_decoded_again(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"prompt": "one", "task": "edit", "image": base64.b64encode(file_of(photo())).decode()}
    key, decoded = {"idempotency-key": "edit"}, []

    def counted(*args: Any) -> DenoiseRequest:
        decoded.append(args)
        return with_files_of(*args)

    monkeypatch.setattr(job_submission, "with_files_of", counted)
    with live(toy_bundle) as running, running.client() as api, ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda _: api.post(JOBS, json=body, headers=key).json()["id"], range(20))
        assert len(set(answers)) == 1
        assert error(api.post(JOBS, json={**body, "n": 2}, headers=key)) == (422, "idempotency_key_reuse")
        assert len(decoded) == 1


def edit_request(service: Service, request: httpx.Request, gone: asyncio.Event) -> Coroutine[Any, Any, list[int]]:
    """The statuses that the application answers; its client disconnects when told."""
    statuses: list[int] = []
    bodies = [{"type": "http.request", "body": request.read(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if bodies:
            return bodies.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        statuses.extend([message["status"]] if "status" in message else [])

    async def ask() -> list[int]:
        headers = [(name.lower(), value) for name, value in request.headers.raw]
        scope = {
            "type": "http",
            "method": "POST",
            "path": request.url.path,
            "query_string": b"",
            "headers": headers,
        }
        await create_app(service)(scope, receive, send)
        return statuses

    return ask()


@pytest.mark.anyio
@pytest.mark.parametrize(
    "request_",
    [
        httpx.Request("POST", "http://t/v1/images/edits", data={"prompt": "one"}, files={"image": NO_IMAGE}),
        httpx.Request("POST", "http://t/sdapi/v1/img2img", json={"prompt": "one", "init_images": [TEXT]}),
    ],
    ids=["openai", "a1111"],
)
async def test_an_edit_whose_client_left_while_it_waited_is_neither_decoded_nor_charged(
    toy_bundle: Path, request_: httpx.Request
) -> None:
    service, gone, free = offline_service(toy_bundle, Settings(quota="1/day")), asyncio.Event(), threading.Event()
    others = [asyncio.create_task(service.decoded(WANTED, holding(free))) for _ in range(DECODES_AT_ONCE)]
    asked = asyncio.create_task(edit_request(service, request_, gone))
    async with asyncio.timeout(60):
        while not service._decoding._waiting:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.001)
        gone.set()
        assert await asked == [499]
    assert not service._decoding._waiting
    free.set()
    await asyncio.gather(*others)
    assert await service.rates.wait_s("1/day", 1, "quota", "default") is None


@pytest.mark.anyio
async def test_a_bounded_number_waits_to_be_decoded(toy_bundle: Path) -> None:
    service, free = offline_service(toy_bundle, Settings()), threading.Event()
    entered = [
        asyncio.create_task(service.decoded(WANTED, holding(free))) for _ in range(DECODES_AT_ONCE + MAX_WAITING)
    ]
    async with asyncio.timeout(60):
        while service._decoding._waiting < MAX_WAITING:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.001)
    with pytest.raises(OverloadedError) as refused:
        await service.decoded(WANTED, holding(free))
    assert refused.value.code == "queue_full"
    assert int(refused.value.headers["retry-after"]) >= 1
    free.set()
    assert await asyncio.gather(*entered) == [WANTED] * len(entered)


@pytest.mark.anyio
async def test_a_turn_lasts_as_long_as_its_thread(toy_bundle: Path) -> None:
    """Not only as long as somebody waits for it."""
    service, free = offline_service(toy_bundle, Settings()), threading.Event()
    left = [asyncio.create_task(service.decoded(WANTED, holding(free))) for _ in range(DECODES_AT_ONCE)]
    async with asyncio.timeout(60):
        while not service._decoding._turns.locked():  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.001)
        for each in left:
            each.cancel()
        await asyncio.wait(left, timeout=0.05)
        assert service._decoding._turns.locked()
        free.set()
        await asyncio.wait(left)
        assert await service.decoded(WANTED, lambda: WANTED) == WANTED


@pytest.mark.anyio
async def test_a_few_are_decoded_at_a_time(toy_bundle: Path) -> None:
    """One more would open the barrier."""
    service = offline_service(toy_bundle, Settings())
    barrier = threading.Barrier(DECODES_AT_ONCE + 1)

    def decode() -> DenoiseRequest:
        barrier.wait(timeout=0.5)
        return WANTED

    decoding = (service.decoded(WANTED, decode) for _ in range(DECODES_AT_ONCE + 1))
    ended = await asyncio.gather(*decoding, return_exceptions=True)
    assert [type(end) for end in ended] == [threading.BrokenBarrierError] * (DECODES_AT_ONCE + 1)
