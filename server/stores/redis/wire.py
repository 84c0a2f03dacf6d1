"""Jobs as Redis keeps them: from and to the fields of its hashes and streams. Every reply is bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from server.jobs import (
    Delivery,
    End,
    IdempotencyKey,
    Job,
    JobEvent,
    JobFailure,
    JobResult,
    JobState,
    JobStatus,
    Lease,
    Preview,
    Total,
)
from server.stores.base import UnreadableJobError

Reply = Sequence[Any]

RETURNED = (None, JobStatus.QUEUED, JobStatus.FAILED)
"""What give_back.lua answers."""

SAFE_POLICY = "noeviction"

_EVENT_ID = re.compile(r"\d+-\d+", re.ASCII)


def job_args(job: Job) -> tuple[str | int | bytes, ...]:
    """What submit.lua takes, but for the key."""
    request = job.request
    return (
        job.id,
        request.model,
        request.task,
        job.tenant,
        job.priority,
        request.n,
        round(job.cost_s * 1e6),
        request.network_steps,
        "" if job.deadline_ms is None else job.deadline_ms,
        job.webhook_url or "",
        written(job),
    )


def written(value: BaseModel) -> str:
    """As Redis keeps it. What is as by default is left out, so that a release without that field reads it, too."""
    return value.model_dump_json(exclude_defaults=True)


def key_name(tenant: str, key: str) -> str:
    """The tenant's length keeps ``a:b`` and ``c`` apart from ``a`` and ``b:c``."""
    return f"{len(tenant)}:{tenant}:{key}"


def key_args(key: IdempotencyKey | None) -> tuple[str, str]:
    """Name and fingerprint."""
    return ("", "") if key is None else (key_name(key.tenant, key.key), key.fingerprint)


def held_args(lease: Lease) -> tuple[str, str, int]:
    return lease.job.id, lease.worker, lease.attempt


ModelT = TypeVar("ModelT", bound=BaseModel)


def job_from(data: bytes, created_ms: bytes) -> Job:
    """Raises: UnreadableJobError."""
    return _read(Job, data).model_copy(update={"created_s": int(created_ms) / 1000})


def _read(kind: type[ModelT], data: bytes) -> ModelT:
    """Raises: UnreadableJobError; what the job holds is not repeated."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        wrong = ", ".join(sorted({".".join(map(str, each["loc"])) for each in error.errors(include_input=False)}))
        raise UnreadableJobError(f"this version cannot read the job's {wrong}") from None


def lease_from(reply: Reply, worker: str) -> Lease:
    """Raises: UnreadableJobError."""
    _, data, created_ms, attempt, queued_ms, alone, left_ms = reply
    return Lease(
        job=job_from(data, created_ms),
        worker=worker,
        attempt=attempt,
        queued_ms=max(0, queued_ms),
        alone=alone == 1,
        left_ms=None if left_ms == b"" else left_ms,
    )


def state_from(fields: Mapping[bytes, bytes], queue_position: int | None) -> JobState:
    """Raises: UnreadableJobError."""
    result, failure = fields.get(b"result"), fields.get(b"failure")
    return JobState(
        job=job_from(fields[b"data"], fields[b"created"]),
        status=JobStatus(fields[b"status"].decode()),
        attempt=int(fields[b"attempt"]),
        step=int(fields[b"step"]),
        queue_position=queue_position,
        result=None if result is None else _read(JobResult, result),
        failure=None if failure is None else _read(JobFailure, failure),
    )


def event_from(entry: bytes, fields: Mapping[bytes, bytes]) -> JobEvent:
    preview = None
    if b"data" in fields:
        preview = Preview(image=int(fields[b"image"]), index=int(fields[b"index"]), data=fields[b"data"])
    return JobEvent.model_validate(
        {
            "id": entry.decode(),
            "type": fields[b"type"].decode(),
            "step": int(fields[b"step"]),
            "preview": preview,
        }
    )


def is_event_id(text: str) -> bool:
    """Two numbers of 64 bits; Redis refuses larger ones."""
    return _EVENT_ID.fullmatch(text) is not None and all(int(part) < 2**64 for part in text.split("-"))


def delivery_from(reply: Reply) -> Delivery:
    job_id, claim, attempt, age_ms, tenant, url, status, ended_ms = reply
    return Delivery(
        job_id=job_id.decode(),
        tenant=tenant.decode(),
        url=url.decode(),
        status=JobStatus(status.decode()),
        ended_s=int(ended_ms) / 1000,
        age_s=max(0, age_ms) / 1000,
        claim=claim,
        attempt=attempt,
    )


def end_from(reply: Reply) -> tuple[str, End]:
    job_id, status, ms = reply
    return job_id.decode(), End(status=JobStatus(status.decode()) if status else None, seconds=max(0, ms) / 1000)


def risks_in(told: Mapping[str | bytes, Any]) -> list[str]:
    """What of a server's INFO and CONFIG may lose accepted jobs; told: either, or what there is of it."""
    said = {_text(name): _text(value) for name, value in told.items()}
    risks = []
    if said.get("maxmemory", "0") != "0" and (policy := said.get("maxmemory_policy", SAFE_POLICY)) != SAFE_POLICY:
        risks.append(f"maxmemory-policy is {policy}, not {SAFE_POLICY}: a full Redis drops jobs")
    if said.get("aof_enabled") == "0":
        risks.append("appendonly is no: what came since the last snapshot, if any is made, is gone with a crash")
    elif (fsync := said.get("appendfsync", "always")) != "always":
        risks.append(f"appendfsync is {fsync}, not always: a crash takes the last accepted jobs with it")
    return risks


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def total_from(name: bytes, count: bytes) -> Total:
    model, task, what = name.decode().split(" ")
    return Total(model=model, task=task, status=None if what == "accepted" else JobStatus(what), count=int(count))
