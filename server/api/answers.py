"""From a finished job to the OpenAI-shaped answer, and to the events of a stream."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Sequence
from typing import Any

from server.catalogue import Catalogue
from server.errors import ApiError, OverloadedError, not_worth_a_retry
from server.jobs import POISON, EncodedImage, JobFailure, JobResult, JobState, Preview, Timing
from server.links import Link
from server.request import DenoiseRequest, find_size
from server.schemas import (
    CompletedEvent,
    ImageBody,
    ImagesResponse,
    InputTokensDetails,
    PartialImageEvent,
    TimingBody,
    Usage,
)


def result_of(state: JobState) -> JobResult:
    """Raises: ApiError when the job did not succeed."""
    if state.result is not None:
        return state.result
    raise failure_error(state.failure or JobFailure(code="cancelled", message="The request was cancelled."))


def shown_result(state: JobState) -> JobResult:
    """Raises: ApiError when the job did not succeed, or when every image of it was withheld."""
    result = result_of(state)
    if all(image.flagged for image in result.images):
        raise withheld(400)
    return result


def withheld(status: int) -> ApiError:
    """What a client gets in place of an image that the safety check flagged."""
    return ApiError(status, "content_policy_violation", "The safety check of this server withheld the image.")


def failure_error(failure: JobFailure) -> ApiError:
    """A failed job is the server's fault: what the client could get wrong was checked before."""
    if failure.retry_after_s is not None:
        return OverloadedError(failure.code, failure.message, retry_after_s=failure.retry_after_s)
    if failure.code == POISON.code:
        return not_worth_a_retry(500, failure.code, failure.message)
    return ApiError(500, failure.code, failure.message)


def images_response(state: JobState, catalogue: Catalogue, links: Sequence[Link | None]) -> ImagesResponse:
    """links: of its images, where they are stored. Raises: ApiError when the job did not succeed."""
    result, request = shown_result(state), state.job.request
    return ImagesResponse(
        created=int(time.time()),
        data=[
            ImageBody(seed=image.seed, **_delivered(image, link))
            for image, link in zip(result.images, links, strict=True)
        ],
        usage=_usage(request, catalogue, range(request.n)),
        seed=request.seed,
        **used_fields(request),
        engine=result.engine,
        timing=timing_body(result.timing),
    )


def partial_event(preview: Preview, request: DenoiseRequest) -> PartialImageEvent:
    edits = request.task != "text_to_image"
    return PartialImageEvent(
        type="image_edit.partial_image" if edits else "image_generation.partial_image",
        b64_json=_base64(preview.data),
        created_at=int(time.time()),
        output_format=request.output_format,
        partial_image_index=preview.index,
        size=f"{request.width}x{request.height}",
        image_index=preview.image,
    )


def completed_events(
    state: JobState, catalogue: Catalogue, links: Sequence[Link | None]
) -> Iterator[CompletedEvent]:
    """One an image. links: as above. Raises: ApiError when the job did not succeed."""
    result, request = shown_result(state), state.job.request
    for index, (image, link) in enumerate(zip(result.images, links, strict=True)):
        yield CompletedEvent(
            type="image_generation.completed" if request.task == "text_to_image" else "image_edit.completed",
            **_delivered(image, link),
            created_at=int(time.time()),
            usage=_usage(request, catalogue, range(index, index + 1)),
            image_index=index,
            seed=image.seed,
            **used_fields(request),
            engine=result.engine,
            timing=timing_body(result.timing),
        )


def used_fields(request: DenoiseRequest) -> dict[str, Any]:
    """What a request is made with, defaults filled in, as every answer says it."""
    return {
        "task": request.task,
        "model": request.model,
        "guidance_scale": request.guidance_scale,
        "steps": request.steps,
        "sampler": request.sampler,
        "strength": request.effective_strength,
        "mode": None if request.image is None else request.mode,
        "encoder_steps": request.encoder_steps,
        "size": f"{request.width}x{request.height}",
        "output_format": request.output_format,
    }


def timing_body(timing: Timing) -> TimingBody:
    return TimingBody(**{stage: round(ms, 3) for stage, ms in timing.model_dump().items()})


def _delivered(image: EncodedImage, link: Link | None) -> dict[str, Any]:
    """Its fields of ``Delivered``."""
    if image.flagged:
        return {"flagged": True}
    if link is None:
        return {"b64_json": _base64(image.inline())}
    return {"url": link.url, "expires_at": link.expires_at}


def _usage(request: DenoiseRequest, catalogue: Catalogue, images: range) -> Usage:
    """Of these images; what came in counts with image 0, so that the events of a stream add up."""
    model = catalogue.find(request.model)
    size = find_size(model.manifest, request)
    cells = size.latent_width * size.latent_height
    text = sum(map(model.tokenizer.count, request.prompts)) if 0 in images else 0
    given = cells if 0 in images and request.image is not None else 0
    return Usage(
        input_tokens=text + given,
        input_tokens_details=InputTokensDetails(text_tokens=text, image_tokens=given),
        output_tokens=len(images) * cells,
        total_tokens=text + given + len(images) * cells,
    )


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
