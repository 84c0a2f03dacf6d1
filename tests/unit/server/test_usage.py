"""What an answer says was used: tokens and cells of its own request, the same in a stream."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.bundle import verify_bundle
from server.api.answers import completed_events, images_response
from server.catalogue import Catalogue, Model
from server.images import write_png
from server.jobs import EncodedImage, Job, JobResult, JobState, JobStatus, Timing
from server.request import DenoiseRequest
from server.schemas import Usage
from tests.support.pictures import photo
from tests.support.serving import ROOT

CELLS = 16 * 16


@pytest.fixture(scope="module")
def emoji() -> Catalogue:
    return Catalogue([Model.of(verify_bundle(Path(ROOT, "server/bundles/emoji")), lambda _: 0.0)])


def succeeded(n: int, **fields: object) -> JobState:
    """A job of the emoji model that has made its images."""
    wanted = {"model": "emoji", "prompt": "fox", "seed": 1, "guidance_scale": 4.0, "steps": 4, "n": n, **fields}
    request = DenoiseRequest.model_validate({"width": 64, "height": 64, **wanted})
    images = tuple(EncodedImage(seed=seed, data=b"png", format="png") for seed in request.seeds)
    result = JobResult(engine="fake", timing=Timing(), images=images)
    return JobState(job=Job(id="a", request=request, cost_s=0), status=JobStatus.SUCCEEDED, result=result)


@pytest.mark.parametrize(
    ("fields", "text", "given"),
    [
        ({}, 4, 0),
        ({"prompt": "fox fox"}, 6, 0),
        ({"task": "edit", "strength": 0.5}, 4, CELLS),
        ({"task": "edit", "mode": "invert", "source_prompt": "fox fox", "encoder_steps": 4}, 4 + 6, CELLS),
    ],
    ids=["prompt", "longer", "edit", "invert"],
)
def test_usage_counts_what_came_in_once_and_what_was_made(
    emoji: Catalogue, fields: dict[str, object], text: int, given: int
) -> None:
    state = succeeded(3, **fields, image=write_png(photo()) if given else None)
    whole = images_response(state, emoji, [None] * 3).usage
    assert (whole.input_tokens_details.text_tokens, whole.input_tokens_details.image_tokens) == (text, given)
    assert (whole.input_tokens, whole.output_tokens) == (text + given, 3 * CELLS)
    assert whole.total_tokens == text + given + 3 * CELLS

    events = [event.usage for event in completed_events(state, emoji, [None] * 3)]

    def total(name: str) -> int:
        return sum(getattr(usage, name) for usage in events)

    assert [usage.input_tokens for usage in events] == [text + given, 0, 0]
    for name in Usage.model_fields.keys() - {"input_tokens_details"}:
        assert total(name) == getattr(whole, name)
