"""The native, asynchronous API: a job is accepted at once, and looked at, followed or cancelled by its id."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter, Header
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from server.api.body import IMAGES_BODY_BYTES, read_object
from server.api.job_answers import job_body, job_events
from server.api.job_reference import EVENTS, IMAGE, JOB, JOB_BODY, REFUSED, REFUSED_SUBMISSION, SUBMITTED, UNKNOWN
from server.api.validation import validate
from server.auth import current_caller
from server.errors import ApiError, InvalidRequestError, NotFoundError
from server.job_requests import resolve_job
from server.job_schemas import JobBody, JobStateBody
from server.jobs import IdempotencyKey, JobState, JobStatus
from server.service import Service

MAX_WAIT_S = 60
_MALFORMED = frozenset({"invalid_json", "duplicate_key", "too_deep", "invalid_encoding"})
_KEY = re.compile(r"[\x20-\x7e]{1,255}")
_JOB_ID = re.compile(r"[0-9a-f]{32}")
_EVENT_ID = re.compile(r"[0-9]{1,20}(-[0-9]{1,20})?")
_WAIT = re.compile(r"(?:^|[,;\s])wait=(\d{1,6})(?:$|[,;\s])")
_MEDIA = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def job_routes(service: Service) -> APIRouter:
    """``/v1/jobs``."""
    router = APIRouter(prefix="/v1/jobs", tags=["Jobs"])

    @router.post(
        "",
        status_code=202,
        response_model=JobStateBody,
        responses=SUBMITTED | REFUSED_SUBMISSION,
        openapi_extra=JOB_BODY,
    )
    async def create_job(
        request: Request,
        idempotency_key: str | None = Header(None, description="Your own name of this request: 1 to 255 of ASCII."),
        prefer: str | None = Header(
            None, description=f"wait=N waits up to N s, at most {MAX_WAIT_S}, for the end."
        ),
    ) -> Response:
        """Accept a job. The same Idempotency-Key and body give the same job, however often they are sent."""
        with _unprocessable():
            fields = await read_object(request, service.settings, limit_bytes=IMAGES_BODY_BYTES)
            key = None if idempotency_key is None else await asyncio.to_thread(_key, idempotency_key, fields)
            body = validate(JobBody, fields)
            job_id = await _submit(service, body, key)
        wait_s = _wait_s(prefer)
        state = await _ended_or_now(service, job_id, wait_s)
        status = 200 if state.status.terminal and wait_s else 202
        headers = {"location": str(request.url_for("read_job", job_id=job_id))}
        if wait_s:
            headers["preference-applied"] = f"wait={wait_s}"
        answer = await job_body(service, request, state)
        return Response(answer.model_dump_json(), status, headers, "application/json")

    @router.get("/{job_id}", responses=JOB | UNKNOWN)
    async def read_job(request: Request, job_id: str) -> JobStateBody:
        """How a job is doing."""
        return await job_body(service, request, await _find(service, job_id))

    @router.delete("/{job_id}", responses=JOB | UNKNOWN | {409: REFUSED[409]})
    async def cancel_job(request: Request, job_id: str) -> JobStateBody:
        """Stop a job at its next step. Cancelling twice is fine; a job that ended otherwise is 409."""
        await _find(service, job_id)
        await service.store.cancel(job_id)
        state = await _find(service, job_id)
        if state.status is not JobStatus.CANCELLED:
            raise ApiError(409, "already_ended", f"This job has {state.status.value}; there is nothing to cancel.")
        return await job_body(service, request, state)

    @router.get("/{job_id}/images/{index}", response_class=Response, responses=IMAGE | UNKNOWN)
    async def read_image(job_id: str, index: str) -> Response:
        """The file of image ``index``, counted from 0."""
        state = await _find(service, job_id)
        if not state.status.terminal:
            raise ApiError(409, "not_ready", "This job has not ended yet; its status_url tells when it has.")
        if state.result is None:
            raise ApiError(409, "no_images", f"This job has {state.status.value}; it has no images.")
        known = {str(k): image for k, image in enumerate(state.result.images)}
        if index not in known:
            raise NotFoundError("not_found", f"This job has the images 0 to {len(known) - 1}.")
        data = known[index].inline()
        return Response(data, media_type=_MEDIA[known[index].format], headers={"cache-control": "private"})

    @router.get("/{job_id}/events", response_class=Response, responses=EVENTS | UNKNOWN)
    async def follow_job(
        request: Request,
        job_id: str,
        last_event_id: str | None = Header(None, description="Send what came after this event."),
    ) -> Response:
        """What happens to a job, from its start or from an event on, as server-sent events."""
        await _find(service, job_id)
        if last_event_id is not None and not _EVENT_ID.fullmatch(last_event_id):
            raise InvalidRequestError("invalid_event_id", "Last-Event-ID must be the id of an event of this job.")
        lines = job_events(service, request, job_id, last_event_id)
        return StreamingResponse(lines, media_type="text/event-stream", headers={"cache-control": "no-store"})

    return router


async def _submit(service: Service, body: JobBody, key: IdempotencyKey | None) -> str:
    if body.image is None:
        wanted = resolve_job(body, service.catalogue)
    else:
        wanted = await asyncio.to_thread(resolve_job, body, service.catalogue)
    if body.webhook_url is not None:
        service.webhooks.check(body.webhook_url)
    return await service.submit(
        wanted, key=key, priority=body.priority or 0, deadline_ms=body.deadline_ms, webhook_url=body.webhook_url
    )


async def _find(service: Service, job_id: str) -> JobState:
    """Raises: NotFoundError where the caller's tenant has no such job; ApiError 410 where it had."""
    tenant = current_caller.get().tenant
    state = await service.store.get(job_id) if _JOB_ID.fullmatch(job_id) else None
    if state is not None and state.job.tenant == tenant:
        return state
    if service.signer.made_job_id(tenant, job_id):
        raise ApiError(410, "gone", "This job has ended and its time is over.")
    raise NotFoundError("job_not_found", "There is no such job.")


async def _ended_or_now(service: Service, job_id: str, wait_s: int) -> JobState:
    if wait_s:
        try:
            async with asyncio.timeout(wait_s):
                return await service.store.wait(job_id)
        except TimeoutError:
            pass
    return await _find(service, job_id)


def _key(sent: str, fields: dict[str, Any]) -> IdempotencyKey:
    """Writes the whole body again, files included, so call it beside the event loop. Raises: ApiError 400."""
    if not _KEY.fullmatch(sent):
        raise ApiError(400, "invalid_idempotency_key", "Idempotency-Key must be 1 to 255 characters of ASCII.")
    text = json.dumps(fields, sort_keys=True, ensure_ascii=True)
    return IdempotencyKey(
        tenant=current_caller.get().tenant, key=sent, fingerprint=hashlib.sha256(text.encode()).hexdigest()
    )


def _wait_s(prefer: str | None) -> int:
    """Source: RFC 7240; a preference that cannot be met is not an error."""
    found = _WAIT.search(prefer or "")
    return min(int(found[1]), MAX_WAIT_S) if found else 0


@contextmanager
def _unprocessable() -> Iterator[None]:
    """In this API what is JSON but not a request is 422."""
    try:
        yield
    except InvalidRequestError as error:
        if error.code not in _MALFORMED:
            error.status = 422
        raise
