"""Accepting a job: its body, its key, and how long its caller waits for the end."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header
from pydantic.json_schema import SkipJsonSchema
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import IMAGES_BODY_BYTES, base_url, read_object
from server.api.job_answers import accepted_body, job_body
from server.api.job_reference import JOB_BODY, REFUSED_SUBMISSION, SUBMITTED
from server.api.jobs import find_job
from server.api.validation import validate
from server.auth import current_caller
from server.errors import ApiError, InvalidRequestError
from server.job_requests import resolve_job, with_files_of
from server.job_schemas import AcceptedJobBody, JobBody, JobStateBody
from server.jobs import IdempotencyKey, JobState, JobStatus
from server.resolve import Edit
from server.service import JobOptions, Service
from server.storage import ResultStoreError
from server.stores.base import StoreUnavailableError, UnreadableJobError
from server.strict_json import MALFORMED

MAX_WAIT_S = 60
_KEY = re.compile(r"[\x20-\x7e]{1,255}")
_IDEMPOTENCY_KEY = Header(
    description="Your own name of this request: 1 to 255 of ASCII.",
    json_schema_extra={"minLength": 1, "maxLength": 255},
)
_PREFER = Header(description=f"wait=N waits up to N s, at most {MAX_WAIT_S}, for the end.")
_WAIT = re.compile(r'(?:^|[,;\s])wait\s*=\s*"?(\d{1,6})"?(?:$|[,;\s])', re.IGNORECASE)


def job_submission_routes(service: Service) -> APIRouter:
    """``POST /v1/jobs``."""
    router = APIRouter(prefix="/v1/jobs", tags=["Jobs"])

    @router.post(
        "",
        status_code=202,
        response_model=JobStateBody | AcceptedJobBody,
        responses=SUBMITTED | REFUSED_SUBMISSION,
        openapi_extra=JOB_BODY,
    )
    async def create_job(
        request: Request,
        idempotency_key: Annotated[str | SkipJsonSchema[None], _IDEMPOTENCY_KEY] = None,
        prefer: Annotated[str | SkipJsonSchema[None], _PREFER] = None,
    ) -> Response:
        """Accept a job. The same Idempotency-Key and body give the same job, however often they are sent."""
        with _unprocessable():
            fields = await read_object(request, service.settings, limit_bytes=IMAGES_BODY_BYTES)
            key = None if idempotency_key is None else await asyncio.to_thread(_key, idempotency_key, fields)
            body = validate(JobBody, fields)
            job_id = await _submit(service, body, key, base_url(request))
        wait_s = _wait_s(prefer)
        status, answer = await _answer(service, request, job_id, wait_s)
        headers = {"location": str(request.url_for("read_job", job_id=job_id))}
        if wait_s:
            headers["preference-applied"] = f"wait={wait_s}"
        return Response(answer.model_dump_json(), status, headers, "application/json")

    return router


async def _submit(service: Service, body: JobBody, key: IdempotencyKey | None, base: str) -> str:
    options = JobOptions(body.priority or 0, body.deadline_ms, body.webhook_url, base)
    wanted = resolve_job(body, service.catalogue)
    if body.webhook_url is not None:
        service.webhooks.check(body.webhook_url)
    if isinstance(wanted, Edit):
        return await service.submit(wanted.outline, key, options, partial(with_files_of, body, wanted))
    return await service.submit(wanted, key, options)


async def _answer(service: Service, request: Request, job_id: str, wait_s: int) -> tuple[int, AcceptedJobBody]:
    """Status and body once there is a job.

    Where it cannot be read its id is told all the same: after an error it would be sent again and made twice.
    """
    known = JobStatus.QUEUED
    try:
        state = await _ended_or_now(service, job_id, wait_s)
        known = state.status
        body = await job_body(service, request, state)
    except (StoreUnavailableError, ResultStoreError, UnreadableJobError):
        return 202, accepted_body(request, job_id, known)
    return 200 if known.terminal and wait_s else 202, body


async def _ended_or_now(service: Service, job_id: str, wait_s: int) -> JobState:
    if wait_s:
        with suppress(TimeoutError, KeyError):  # an answer without the end; or the job is gone, which is said below
            async with asyncio.timeout(wait_s):
                if (ended := await service.until_ended(job_id)) is not None:
                    return ended
    return await find_job(service, job_id)


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
        if error.code not in MALFORMED:
            error.status = 422
        raise
