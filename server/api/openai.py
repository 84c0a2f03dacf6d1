"""The OpenAI-shaped image API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from functools import partial

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from server.api.answers import completed_events, images_response, partial_event
from server.api.body import base_url, client_gone, read_object
from server.api.disconnection import cancelled_when_gone, unless_gone
from server.api.event_stream import EVENT_STREAM, HEADERS, kept_alive, with_error_event
from server.api.multipart import read_form
from server.api.reference import (
    EDIT_BODY,
    EDIT_RESPONSES,
    GENERATION_BODY,
    GENERATION_RESPONSES,
    MODEL_RESPONSES,
)
from server.api.validation import form_values, validate
from server.catalogue import Model
from server.errors import InvalidRequestError
from server.fitting import alpha_is_edit
from server.jobs import JobStatus
from server.request import DenoiseRequest
from server.resolve import resolve, resolve_edit
from server.schemas import (
    CompletedEvent,
    EditBody,
    GenerationBody,
    GuidanceBody,
    ModelBody,
    ModelsResponse,
    PartialImageEvent,
    StepsBody,
)
from server.service import Service


def openai_routes(service: Service) -> APIRouter:
    """``/v1/images/generations``, ``/v1/images/edits`` and ``/v1/models``."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    @router.post("/images/generations", responses=GENERATION_RESPONSES, openapi_extra=GENERATION_BODY)
    async def create_image(request: Request) -> Response:
        """Draw n images of a prompt."""
        body = validate(GenerationBody, await read_object(request, service.settings))
        wanted = resolve(body, service.catalogue)
        return await _answer(service, request, wanted, stream=bool(body.stream))

    @router.post("/images/edits", responses=EDIT_RESPONSES, openapi_extra=EDIT_BODY)
    async def edit_image(request: Request) -> Response:
        """Draw a prompt from an image: over all of it, or where the mask is transparent."""
        form = await read_form(request)
        body = validate(EditBody, form_values(EditBody, form.texts))
        image, mask = form.files.get("image"), form.files.get("mask")
        if image is None:
            message = "image is required: send a PNG, JPEG or WebP file."
            raise InvalidRequestError("missing_field", message, param="image")
        edit = resolve_edit(body, service.catalogue, masked=mask is not None)
        decode = partial(edit.with_files, image, mask, alpha_is_edit)
        wanted = await unless_gone(request, service.decoded(edit.outline, decode))
        return await _answer(service, request, wanted, stream=bool(body.stream))

    @router.head("/models", include_in_schema=False)
    @router.get("/models")
    async def list_models() -> ModelsResponse:
        """The models on offer, the default first."""
        return ModelsResponse(data=[_model_body(model) for model in service.catalogue])

    @router.head("/models/{model_id}", include_in_schema=False)
    @router.get("/models/{model_id}", responses=MODEL_RESPONSES)
    async def retrieve_model(model_id: str) -> ModelBody:
        """What one model can do."""
        return _model_body(service.catalogue.find(model_id))

    return router


async def _answer(service: Service, request: Request, wanted: DenoiseRequest, *, stream: bool) -> Response:
    """Have it made, and answer with the images or with events."""
    if stream:
        return await _stream(service, request, wanted)
    async with service.accepted(wanted) as job_id, cancelled_when_gone(service, request, job_id):
        state = await service.result(job_id)
        if state.status is JobStatus.CANCELLED:
            raise client_gone()
        answer = images_response(state, service.catalogue, await service.links_of(state, base_url(request)))
        return Response(answer.model_dump_json(), media_type="application/json")


class _AcceptedStream(StreamingResponse):
    """The events of an accepted request; leaves ``accepted`` even when the client was gone before the first."""

    def __init__(self, accepted: AbstractAsyncContextManager[str], events: AsyncIterator[str]) -> None:
        super().__init__(kept_alive(events), media_type=EVENT_STREAM, headers=HEADERS)
        self._accepted = accepted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._accepted.__aexit__(None, None, None)


async def _stream(service: Service, request: Request, wanted: DenoiseRequest) -> StreamingResponse:
    """Accept first, so that a refusal still has its status; then answer with events."""
    accepted = service.accepted(wanted)
    job_id = await accepted.__aenter__()

    async def events() -> AsyncIterator[str]:
        async with cancelled_when_gone(service, request, job_id):
            async for line in with_error_event(_images_as_made(service, job_id, wanted, base_url(request))):
                yield line

    return _AcceptedStream(accepted, events())


async def _images_as_made(service: Service, job_id: str, wanted: DenoiseRequest, base: str) -> AsyncIterator[str]:
    sent: set[tuple[int, int]] = set()
    async for told in service.store.events(job_id):
        preview = told.preview
        if preview is not None and (preview.image, preview.index) not in sent:  # an attempt after the first repeats
            sent.add((preview.image, preview.index))
            yield _event(partial_event(preview, wanted))
    state = await service.store.wait(job_id)
    links = await service.links_of(state, base)
    for event in list(completed_events(state, service.catalogue, links)):
        yield _event(event)


def _event(body: PartialImageEvent | CompletedEvent) -> str:
    return f"event: {body.type}\ndata: {body.model_dump_json()}\n\n"


def _model_body(model: Model) -> ModelBody:
    manifest = model.manifest
    students = manifest.students
    trained = sorted({student.steps for student in students})
    return ModelBody(
        id=manifest.name,
        created=manifest.created,
        description=manifest.description,
        guidance_scale=GuidanceBody(**manifest.guidance.model_dump()),
        steps=StepsBody(trained=trained, default=manifest.default_steps),
        samplers={n: sorted(s.sampler for s in students if s.steps == n) for n in trained},
        sizes=[str(size) for size in manifest.sizes],
        tasks=list(manifest.tasks),
        decoder=manifest.decoder,
        prompts=list(model.tokenizer.known()),
    )
