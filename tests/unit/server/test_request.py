"""The border between API and worker: which fields belong to which task, and bytes that survive JSON."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from server.jobs import Job
from server.request import DenoiseRequest


def png(mode: str = "RGB", size: tuple[int, int] = (16, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 200 if mode == "L" else (1, 2, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def request(**fields: Any) -> DenoiseRequest:
    base = {"model": "m", "prompt": "p", "seed": 1, "guidance_scale": 2.0, "steps": 4, "width": 16, "height": 16}
    return DenoiseRequest.model_validate(base | fields)


EDIT = {"task": "edit", "image": png(), "strength": 0.6}
INPAINT = {"task": "inpaint", "image": png(), "mask": png("L"), "strength": 1.0}
INVERT = {"task": "edit", "image": png(), "mode": "invert", "source_prompt": "q", "encoder_steps": 8}


@pytest.mark.parametrize(
    ("fields", "entry", "network_steps"), [({}, None, 4), (EDIT, 2, 2), (INPAINT, 4, 4), (INVERT, None, 12)]
)
def test_each_task_and_its_steps(fields: dict[str, Any], entry: int | None, network_steps: int) -> None:
    made = request(**fields)
    assert (made.entry, made.network_steps) == (entry, network_steps)


@pytest.mark.parametrize("fields", [{}, EDIT, INPAINT, INVERT], ids=["text", "edit", "inpaint", "invert"])
def test_a_job_survives_json(fields: dict[str, Any]) -> None:
    job = Job(id="a", request=request(**fields), cost_s=1.0)
    assert Job.model_validate_json(job.model_dump_json()) == job


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"image": png()}, "image"),
        ({"strength": 0.5}, "strength"),
        ({"mode": "invert"}, "source_prompt"),
        (EDIT | {"image": None}, "image"),
        (EDIT | {"mask": png("L")}, "mask"),
        (EDIT | {"strength": None}, "strength"),
        (EDIT | {"strength": 0.0}, "strength"),
        (EDIT | {"strength": 1.0001}, "strength"),
        (EDIT | {"source_prompt": "q"}, "source_prompt"),
        (INPAINT | {"mask": None}, "mask"),
        (INPAINT | {"mask": png()}, "mask"),
        (INPAINT | {"mask": png("L", (8, 16))}, "mask"),
        (EDIT | {"image": png("L")}, "image"),
        (EDIT | {"image": png(size=(32, 16))}, "image"),
        (EDIT | {"image": b"text"}, "image"),
        (INVERT | {"source_prompt": None}, "source_prompt"),
        (INVERT | {"encoder_steps": None}, "encoder_steps"),
        (INVERT | {"task": "inpaint", "mask": png("L")}, "invert"),
    ],
)
def test_what_does_not_belong_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        request(**fields)
