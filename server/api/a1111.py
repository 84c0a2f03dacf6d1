"""A subset of AUTOMATIC1111's API, for the clients that speak it.

Those clients always send more than a student has: size, steps, cfg_scale and sampler_name are brought to what was
trained, which ``info.adjusted`` lists; other fields are accepted where their value asks for nothing, else refused.
Source: AUTOMATIC1111/stable-diffusion-webui, modules/api/models.py.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.a1111_fields import ImageWish, TextWish, adjusted_text, resolve_image
from server.api.answers import result_of
from server.api.body import IMAGES_BODY_BYTES, read_object
from server.api.openai import cancelled_when_gone
from server.api.validation import validate
from server.auth import current_caller
from server.errors import ApiError, InvalidRequestError
from server.images import decode_file
from server.jobs import JobState, JobStatus
from server.request import DenoiseRequest
from server.resolve import resolve
from server.service import Service


class A1111Error(ApiError):
    """An error in the shape these clients read; a wrong field is 422."""

    @classmethod
    def of(cls, error: ApiError) -> A1111Error:
        status = 422 if error.status == 400 else error.status
        made = cls(status, error.code, error.message, param=error.param, headers=error.headers)
        made.after_acceptance = error.after_acceptance
        return made

    def body(self) -> dict[str, Any]:
        return {"error": self.code, "detail": self.message, "body": "", "errors": self.param or ""}


def a1111_routes(service: Service) -> APIRouter:
    """``/sdapi/v1``."""
    router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])
    _settled_routes(router, service)
    running: dict[str, set[str]] = defaultdict(set)
    """Jobs of this API under way, by tenant."""

    async def make(request: Request, wanted: DenoiseRequest, adjusted: dict[str, Any], *, send: bool) -> Response:
        tenant = current_caller.get().tenant
        async with service.accepted(wanted) as job_id, cancelled_when_gone(service, request, job_id):
            running[tenant].add(job_id)
            try:
                state = await service.store.wait(job_id)
            finally:
                running[tenant].discard(job_id)
            return _response(_answer(state, adjusted, send=send))

    @router.post("/txt2img")
    async def txt2img(request: Request) -> Response:
        """Draw a prompt."""
        with _as_a1111():
            wish = validate(TextWish, await read_object(request, service.settings))
            body, adjusted = adjusted_text(wish, service.catalogue)
            return await make(request, resolve(body, service.catalogue), adjusted, send=wish.send_images)

    @router.post("/img2img")
    async def img2img(request: Request) -> Response:
        """Draw a prompt from an image; with a mask, only where the mask is white."""
        with _as_a1111():
            fields = await read_object(request, service.settings, limit_bytes=IMAGES_BODY_BYTES)
            wish = validate(ImageWish, fields)
            if len(wish.init_images) != 1:
                message = "init_images must hold exactly one image."
                raise InvalidRequestError("out_of_range", message, param="init_images")
            image = decode_file(wish.init_images[0], "init_images")
            mask = None if wish.mask is None else decode_file(wish.mask, "mask")
            wanted, adjusted = await asyncio.to_thread(resolve_image, wish, image, mask, service.catalogue)
            return await make(request, wanted, adjusted, send=wish.send_images)

    @router.get("/progress")
    async def progress() -> dict[str, Any]:
        """How far this tenant's images of this API are."""
        found = [await service.store.get(job_id) for job_id in list(running[current_caller.get().tenant])]
        states = [state for state in found if state is not None]
        steps = sum(state.job.request.network_steps for state in states)
        done = sum(state.step for state in states)
        state = {"job_count": len(states), "sampling_step": done, "sampling_steps": steps}
        return {
            "progress": done / steps if steps else 0.0,
            "eta_relative": 0.0,
            "state": state,
            "current_image": None,
            "textinfo": None,
        }

    @router.post("/interrupt")
    async def interrupt() -> dict[str, Any]:
        """Stop this tenant's images of this API at their next step."""
        for job_id in list(running[current_caller.get().tenant]):
            await service.store.cancel(job_id)
        return {}

    return router


def _settled_routes(router: APIRouter, service: Service) -> None:
    """What clients ask before they draw; none of it can be changed by them."""

    @router.get("/options")
    async def options() -> dict[str, Any]:
        """What is set; the model is the first one served."""
        return {"sd_model_checkpoint": service.catalogue.default.name, "samples_format": "png"}

    @router.post("/options")
    async def set_options(request: Request) -> None:
        """Accepts what is set already: nothing here is shared between requests."""
        with _as_a1111():
            now = await options()
            for name, value in (await read_object(request, service.settings)).items():
                if name not in now or now[name] != value:
                    message = "This option cannot be changed here; it is set where the server is started."
                    raise InvalidRequestError("unsupported_value", message, param="options")

    @router.get("/samplers")
    async def samplers() -> list[dict[str, Any]]:
        """The samplers some student was trained for."""
        names = {student.sampler for model in service.catalogue for student in model.manifest.students}
        return [{"name": name, "aliases": [], "options": {}} for name in sorted(names)]

    @router.get("/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        """The schedule is the student's own."""
        return [{"name": "automatic", "label": "Automatic", "aliases": None}]

    @router.get("/scripts")
    async def scripts() -> dict[str, list[str]]:
        """None."""
        return {"txt2img": [], "img2img": []}

    @router.get("/sd-models")
    async def models() -> list[dict[str, Any]]:
        """The models on offer."""
        return [
            {
                "title": m.name,
                "model_name": m.name,
                "hash": None,
                "sha256": None,
                "filename": m.name,
                "config": None,
            }
            for m in service.catalogue
        ]


@contextmanager
def _as_a1111() -> Iterator[None]:
    try:
        yield
    except ApiError as error:
        raise A1111Error.of(error) from None


def _answer(state: JobState, adjusted: dict[str, Any], *, send: bool) -> dict[str, Any]:
    request = state.job.request
    interrupted = state.status is JobStatus.CANCELLED
    files = () if interrupted else result_of(state).images
    seeds = [image.seed for image in files]
    used = {
        "prompt": request.prompt,
        "seed": request.seed,
        "width": request.width,
        "height": request.height,
        "steps": request.steps,
        "cfg_scale": request.guidance_scale,
        "sampler_name": request.sampler,
        "batch_size": request.n,
        "denoising_strength": request.effective_strength,
    }
    info = {
        **used,
        "all_prompts": [request.prompt] * len(seeds),
        "all_seeds": seeds,
        "sd_model_name": request.model,
        "interrupted": interrupted,
        "adjusted": adjusted,
    }
    images = [base64.b64encode(image.inline()).decode("ascii") for image in files] if send else []
    return {"images": images, "parameters": used, "info": json.dumps(info)}


def _response(body: dict[str, Any]) -> Response:
    return Response(json.dumps(body), media_type="application/json")
