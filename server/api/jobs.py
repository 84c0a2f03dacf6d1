"""The native, asynchronous API: a job that was accepted is looked at, followed or cancelled by its id."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Header
from pydantic.json_schema import SkipJsonSchema
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from server.api.answers import withheld
from server.api.event_stream import EVENT_STREAM, HEADERS, kept_alive, with_error_event
from server.api.job_answers import job_body, job_events
from server.api.job_reference import EVENTS, IMAGE, JOB, REFUSED, UNKNOWN
from server.auth import current_caller
from server.errors import ApiError, InvalidRequestError, NotFoundError, job_gone, not_worth_a_retry
from server.job_schemas import JobStateBody
from server.jobs import EncodedImage, JobState, JobStatus
from server.request import media_type
from server.service import Service

_JOB_ID = re.compile(r"[0-9a-f]{32}")
_LAST_EVENT_ID = Header(
    description="Send what came after this event.", json_schema_extra={"pattern": r"^[0-9]{1,20}(-[0-9]{1,20})?$"}
)


def job_routes(service: Service) -> APIRouter:
    """``/v1/jobs/{job_id}``."""
    router = APIRouter(prefix="/v1/jobs", tags=["Jobs"])

    @router.head("/{job_id}", include_in_schema=False)
    @router.get("/{job_id}", responses=JOB | UNKNOWN)
    async def read_job(request: Request, job_id: str) -> JobStateBody:
        """How a job is doing."""
        return await job_body(service, request, await find_job(service, job_id))

    @router.delete("/{job_id}", responses=JOB | UNKNOWN | {409: REFUSED[409]})
    async def cancel_job(request: Request, job_id: str) -> JobStateBody:
        """Stop a job at its next step. Cancelling twice is fine; a job that ended otherwise is 409."""
        await find_job(service, job_id)
        await service.store.cancel(job_id)
        state = await find_job(service, job_id)
        if state.status is not JobStatus.CANCELLED:
            message = f"This job has {state.status.value}; there is nothing to cancel."
            raise not_worth_a_retry(409, "already_ended", message)
        return await job_body(service, request, state)

    @router.head("/{job_id}/images/{index}", include_in_schema=False)
    @router.get("/{job_id}/images/{index}", response_class=Response, responses=IMAGE | UNKNOWN)
    async def read_image(job_id: str, index: str) -> Response:
        """The file of image ``index``, counted from 0."""
        image = _image(await find_job(service, job_id), index)
        data = await service.file_of(image)
        return Response(data, media_type=media_type(image.format), headers={"cache-control": "private"})

    @router.get("/{job_id}/events", response_class=Response, responses=EVENTS | UNKNOWN)
    async def follow_job(
        request: Request,
        job_id: str,
        last_event_id: Annotated[str | SkipJsonSchema[None], _LAST_EVENT_ID] = None,
    ) -> Response:
        """What happens to a job, from its start or from an event on, as server-sent events."""
        state = await find_job(service, job_id)
        if last_event_id is not None and not service.store.is_event_id(last_event_id):
            raise InvalidRequestError("invalid_event_id", "Last-Event-ID must be the id of an event of this job.")
        if last_event_id is not None and state.status.terminal and await _all_told(service, job_id, last_event_id):
            return Response(status_code=204)  # by which an EventSource knows not to come back
        lines = with_error_event(job_events(service, request, state, last_event_id))
        # Where other processes go on, one of them replays from the last id.
        return StreamingResponse(kept_alive(lines, service.leaving), media_type=EVENT_STREAM, headers=HEADERS)

    return router


async def find_job(service: Service, job_id: str) -> JobState:
    """Raises: NotFoundError where the caller's tenant has no such job; ApiError 410 where it had."""
    tenant = current_caller.get().tenant
    state = await service.store.get(job_id) if _JOB_ID.fullmatch(job_id) else None
    if state is not None and state.job.tenant == tenant:
        return state
    if service.signer.made_job_id(tenant, job_id):
        raise job_gone()
    raise NotFoundError("job_not_found", "There is no such job.")


async def _all_told(service: Service, job_id: str, event_id: str) -> bool:
    """Whether nothing came after an event of a job that has ended. Raises: ApiError 410 where it was forgotten."""
    try:
        async for _ in service.store.events(job_id, event_id):
            return False
    except KeyError:
        raise job_gone() from None
    return True


def _image(state: JobState, index: str) -> EncodedImage:
    """Raises: ApiError 403 where it was withheld, 409 where there is none yet, or never; NotFoundError."""
    if not state.status.terminal:
        raise ApiError(409, "not_ready", "This job has not ended yet; its status_url tells when it has.")
    if state.result is None:
        raise not_worth_a_retry(409, "no_images", f"This job ended as {state.status.value}; it has no images.")
    known = {str(k): image for k, image in enumerate(state.result.images)}
    if index not in known:
        raise NotFoundError("not_found", f"This job has the images 0 to {len(known) - 1}.")
    if known[index].flagged:
        raise withheld(403)
    return known[index]
