"""The jobs routes of the contract, as far as the ledger needs them."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.api.body import read_object
from server.api.validation import validate
from server.jobs import DEFAULT_TENANT, IdempotencyKey, Job
from server.resolve import resolve
from server.schemas import GenerationBody
from server.service import Service


def jobs_routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1/jobs")

    @router.post("")
    async def submit(request: Request) -> Response:
        body = await read_object(request, service.settings)
        body.pop("task")
        wanted = resolve(validate(GenerationBody, body), service.catalogue)
        fingerprint = hashlib.sha256(repr(sorted(body.items())).encode()).hexdigest()
        key = IdempotencyKey(tenant=DEFAULT_TENANT, key=request.headers["idempotency-key"], fingerprint=fingerprint)
        service.admission.check(await service.store.backlog(), wanted)
        job = Job(id=secrets.token_hex(12), request=wanted, cost_s=service.admission.cost_s(wanted))
        submission = await service.store.submit(job, key)
        return JSONResponse({"id": submission.job_id}, 202)

    @router.get("/{job_id}")
    async def read(job_id: str) -> Any:
        state = await service.store.get(job_id)
        if state is None:
            return JSONResponse({"error": {"code": "not_found"}}, 404)
        return {"status": state.status, "error": {"code": state.failure.code} if state.failure else None}

    @router.get("/{job_id}/images/{index}")
    async def image(job_id: str, index: int) -> Response:
        state = await service.store.get(job_id)
        if state is None or state.result is None:
            return Response(status_code=404)
        return Response(state.result.images[index].inline(), media_type="image/png")

    return router
