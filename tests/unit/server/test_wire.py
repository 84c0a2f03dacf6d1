"""What jobs and results look like in Redis: another release, without a field that is not used, reads them, too."""

from __future__ import annotations

import json

import pytest

from server.jobs import EncodedImage, Job, JobResult, Timing
from server.request import DenoiseRequest
from server.stores.base import UnreadableJobError
from server.stores.redis import wire

REQUEST = DenoiseRequest(model="m", prompt="seven", seed=4, guidance_scale=2.0, steps=4, width=8, height=8)
JOB = Job(id="j", request=REQUEST, cost_s=0.5)


def test_a_job_is_written_without_what_it_has_by_default() -> None:
    *_, data = wire.job_args(JOB)
    held = json.loads(str(data))
    assert held.keys() == {"id", "request", "cost_s"}
    assert held["request"].keys() == {"model", "prompt", "seed", "guidance_scale", "steps", "width", "height"}
    assert wire.job_from(str(data).encode(), b"0") == JOB
    used = JOB.model_copy(update={"priority": 3})
    assert json.loads(wire.written(used)).keys() == {"id", "request", "cost_s", "priority"}


def test_a_result_is_written_so_too() -> None:
    image = EncodedImage(seed=4, data=b"x", format="png")
    result = JobResult(engine="e", timing=Timing(steps=3.0), images=(image,))
    held = json.loads(wire.written(result))
    assert held == {
        "engine": "e",
        "timing": {"steps": 3.0},
        "images": [{"seed": 4, "data": "eA==", "format": "png"}],
    }
    assert JobResult.model_validate_json(wire.written(result)) == result


def test_a_field_that_this_release_has_not_is_refused_by_name() -> None:
    data = json.dumps({**json.loads(wire.written(JOB)), "canary": "what it holds"})
    with pytest.raises(UnreadableJobError, match="canary") as caught:
        wire.job_from(data.encode(), b"0")
    assert "what it holds" not in str(caught.value)


def test_a_key_is_its_tenants_however_either_is_written() -> None:
    assert wire.key_name("a:b", "c") != wire.key_name("a", "b:c")


@pytest.mark.parametrize(
    ("text", "could_be"),
    [("0-0", True), (f"{2**64 - 1}-{2**64 - 1}", True), (f"{2**64}-0", False), (f"0-{2**64}", False), ("1", False)],
)
def test_an_event_has_an_id_that_redis_takes(text: str, could_be: bool) -> None:
    assert wire.is_event_id(text) is could_be
