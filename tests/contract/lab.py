"""What the tests of the contract share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from server.jobs import EncodedImage, Job, JobFailure, JobResult, JobStatus, Timing
from server.request import DenoiseRequest
from server.stores.base import JobStore

LEASE_S = 10.0
RESULT_TTL_S = 60.0
MODELS = ("m",)

RESULT = JobResult(
    engine="fake", timing=Timing(), images=(EncodedImage(seed=1, data=b"\x89png\xff", format="png"),)
)
FAILURE = JobFailure(code="engine_error", message="It failed.")


@dataclass
class Lab:
    """An empty store whose time a test can move. pass_time: seconds."""

    store: JobStore
    pass_time: Callable[[float], Awaitable[None]]


def job(name: str, n: int = 1, cost_s: float = 1.0, model: str = "m", **fields: Any) -> Job:
    request = DenoiseRequest(
        model=model, prompt="p", n=n, seed=1, guidance_scale=2.0, steps=4, width=8, height=8, partial_images=2
    )
    return Job(id=name, request=request, cost_s=cost_s, **fields)


async def status(lab: Lab, name: str) -> JobStatus:
    state = await lab.store.get(name)
    assert state is not None
    return state.status
