"""From the state of a job to the bodies of the jobs API, and to its events."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator

from starlette.requests import Request

from server.api.answers import failure_error, timing_body, used_fields
from server.api.body import base_url
from server.errors import job_gone
from server.job_schemas import AcceptedJobBody, EventName, JobEventBody, JobImageBody, JobPreviewBody, JobStateBody
from server.jobs import JobEvent, JobState, JobStatus
from server.schemas import ErrorDetail
from server.service import Service


def accepted_body(request: Request, job_id: str, status: JobStatus) -> AcceptedJobBody:
    """request: names the host, as the client knows it, that the addresses start with."""
    base = f"{base_url(request)}/v1/jobs/{job_id}"
    return AcceptedJobBody(
        id=job_id, status=status.value, status_url=base, events_url=f"{base}/events", cancel_url=base
    )


async def job_body(service: Service, request: Request, state: JobState) -> JobStateBody:
    """request: as above. Raises: ResultStoreError; StoreUnavailableError."""
    job, wanted, result = state.job, state.job.request, state.result
    accepted = accepted_body(request, job.id, state.status)
    links = await service.links_of(state, base_url(request))
    images = [
        JobImageBody(
            index=k,
            seed=image.seed,
            output_format=image.format,
            flagged=image.flagged,
            url=None if image.flagged else f"{accepted.status_url}/images/{k}" if link is None else link.url,
            expires_at=None if link is None else link.expires_at,
        )
        for k, (image, link) in enumerate(zip(result.images if result else (), links, strict=True))
    ]
    return JobStateBody(
        **accepted.model_dump(),
        created=int(job.created_s),
        queue_position=state.queue_position,
        step=state.step,
        total_steps=wanted.network_steps,
        eta_ms=await _eta_ms(service, state),
        n=wanted.n,
        seed=wanted.seed,
        **used_fields(wanted),
        priority=job.priority,
        deadline_ms=job.deadline_ms,
        engine=result.engine if result else None,
        timing=timing_body(result.timing) if result else None,
        images=images,
        error=_error(state),
    )


async def job_events(service: Service, request: Request, state: JobState, after: str | None) -> AsyncIterator[str]:
    """Server-sent events that come after ``after``, until the job has ended.

    Raises: ApiError 410 where it was forgotten; StoreUnavailableError; UnreadableJobError; ResultStoreError.
    """
    try:
        async for event in service.store.events(state.job.id, after):
            if event.terminal:
                state = await service.store.wait(state.job.id)
            yield await _line(service, request, state, event)
    except KeyError:
        raise job_gone() from None


async def _line(service: Service, request: Request, state: JobState, event: JobEvent) -> str:
    kind: EventName = "completed" if event.type == "succeeded" else event.type
    wanted, preview = state.job.request, event.preview
    body = JobEventBody(
        type=kind,
        step=event.step,
        steps=wanted.steps,
        total_steps=wanted.network_steps,
        preview=None
        if preview is None
        else JobPreviewBody(
            b64_json=base64.b64encode(preview.data).decode("ascii"),
            image_index=preview.image,
            partial_image_index=preview.index,
            output_format=wanted.output_format,
        ),
        job=await job_body(service, request, state) if event.terminal else None,
    )
    return f"id: {event.id}\nevent: {kind}\ndata: {body.model_dump_json()}\n\n"


async def _eta_ms(service: Service, state: JobState) -> int | None:
    """Predicted from measured costs: the share of the backlog that goes first, then the job itself."""
    job, cost_s = state.job, state.job.cost_s
    if state.status is JobStatus.QUEUED:
        workers, models = service.costs.sharing(job.request.model)
        backlog = await service.store.backlog(models=models)
        each_s = backlog.seconds / max(backlog.jobs, 1)
        ahead_s = each_s * (state.queue_position or 0) / max(workers, 1)
        return round((ahead_s + cost_s) * 1000)
    if state.status is JobStatus.RUNNING:
        return round(state.left_s * 1000)
    return None


def _error(state: JobState) -> ErrorDetail | None:
    if state.failure is None:
        return None
    return ErrorDetail.model_validate(failure_error(state.failure).body()["error"])
