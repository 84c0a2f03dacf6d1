"""A subset of AUTOMATIC1111's API, for the clients that speak it.

Those clients always send more than a student has: size, steps, cfg_scale and sampler_name are brought to what was
trained, which ``info.adjusted`` lists; other fields are accepted where their value asks for nothing, else refused.
Source: AUTOMATIC1111/stable-diffusion-webui, modules/api/models.py.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.a1111_answers import images_answer
from server.api.a1111_fields import ImageWish, TextWish, adjusted_text, note_fitted, resolve_image, with_files_of
from server.api.a1111_reference import DRAWN, IMAGE_BODY, TEXT_BODY
from server.api.body import IMAGES_BODY_BYTES, read_object
from server.api.disconnection import cancelled_when_gone, unless_gone
from server.api.validation import validate
from server.auth import current_caller
from server.errors import InvalidRequestError
from server.request import DenoiseRequest
from server.resolve import resolve
from server.service import Service


def a1111_routes(service: Service) -> APIRouter:
    """``/sdapi/v1``: what draws, and what looks at the drawing."""
    router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])
    drawings = _Drawings(service)

    @router.post("/txt2img", responses=DRAWN, openapi_extra=TEXT_BODY)
    async def txt2img(request: Request) -> Response:
        """Draw a prompt."""
        wish = validate(TextWish, await read_object(request, service.settings))
        body, adjusted = adjusted_text(wish, service.catalogue)
        return await drawings.make(request, resolve(body, service.catalogue), wish, adjusted)

    @router.post("/img2img", responses=DRAWN, openapi_extra=IMAGE_BODY)
    async def img2img(request: Request) -> Response:
        """Draw a prompt from an image; with a mask, only where the mask is white."""
        fields = await read_object(request, service.settings, limit_bytes=IMAGES_BODY_BYTES)
        wish = validate(ImageWish, fields)
        if len(wish.init_images) != 1:
            message = "init_images must hold exactly one image."
            raise InvalidRequestError("out_of_range", message, param="init_images")
        edit, adjusted = resolve_image(wish, service.catalogue)
        wanted = await unless_gone(request, service.decoded(edit.outline, partial(with_files_of, wish, edit)))
        note_fitted(adjusted, wish, wanted)
        return await drawings.make(request, wanted, wish, adjusted)

    @router.head("/progress", include_in_schema=False)
    @router.get("/progress")
    async def progress() -> dict[str, Any]:
        """How far this tenant's images of this API are."""
        return await drawings.progress()

    @router.post("/interrupt")
    async def interrupt() -> dict[str, Any]:
        """Stop this tenant's images of this API at their next step."""
        await drawings.interrupt()
        return {}

    return router


class _Drawings:
    """Jobs of this API that are under way. These clients know no ids: they ask for, and stop, all of a tenant's."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._jobs: dict[str, set[str]] = defaultdict(set)
        """Ids by tenant."""

    async def make(
        self, request: Request, wanted: DenoiseRequest, wish: TextWish, adjusted: dict[str, Any]
    ) -> Response:
        service, jobs = self._service, self._own
        async with service.accepted(wanted) as job_id, cancelled_when_gone(service, request, job_id):
            jobs.add(job_id)
            try:
                state = await service.result(job_id)
            finally:
                jobs.discard(job_id)
            return images_answer(state, wish, adjusted)

    async def progress(self) -> dict[str, Any]:
        found = [await self._service.store.get(job_id) for job_id in list(self._own)]
        states = [state for state in found if state is not None]
        steps = sum(state.job.request.network_steps for state in states)
        done = sum(state.step for state in states)
        return {
            "progress": done / steps if steps else 0.0,
            "eta_relative": sum(state.left_s for state in states),
            "state": {"job_count": len(states), "sampling_step": done, "sampling_steps": steps},
            "current_image": None,
            "textinfo": None,
        }

    async def interrupt(self) -> None:
        for job_id in list(self._own):
            await self._service.store.cancel(job_id)

    @property
    def _own(self) -> set[str]:
        return self._jobs[current_caller.get().tenant]
