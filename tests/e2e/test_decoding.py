"""Files of edits are decoded a few at a time, and not at all where the edit would be refused."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.request import DenoiseRequest
from server.service import DECODES_AT_ONCE
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


@pytest.mark.anyio
async def test_a_few_are_decoded_at_a_time(toy_bundle: Path) -> None:
    """One more would open the barrier."""
    service = offline_service(toy_bundle, Settings())
    wanted = DenoiseRequest(
        model="toy-digits", prompt="one", seed=1, guidance_scale=2.0, steps=4, width=64, height=64
    )
    barrier = threading.Barrier(DECODES_AT_ONCE + 1)

    def decode() -> DenoiseRequest:
        barrier.wait(timeout=0.5)
        return wanted

    decoding = (service.decoded(wanted, decode) for _ in range(DECODES_AT_ONCE + 1))
    ended = await asyncio.gather(*decoding, return_exceptions=True)
    assert [type(end) for end in ended] == [threading.BrokenBarrierError] * (DECODES_AT_ONCE + 1)
