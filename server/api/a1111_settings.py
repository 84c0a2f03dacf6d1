"""What AUTOMATIC1111's clients ask before they draw; none of it can be changed by them."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from server.api.a1111_reference import OPTIONS_BODY, REFUSED
from server.api.body import read_object
from server.errors import InvalidRequestError
from server.service import Service


def a1111_settings_routes(service: Service) -> APIRouter:
    """``/sdapi/v1/options``, and the lists of samplers, schedulers, scripts and models."""
    router = APIRouter(prefix="/sdapi/v1", tags=["AUTOMATIC1111"])

    @router.head("/options", include_in_schema=False)
    @router.get("/options")
    async def options() -> dict[str, Any]:
        """What is set; the model is the first one served."""
        return {"sd_model_checkpoint": service.catalogue.default.name, "samples_format": "png"}

    @router.post("/options", responses=REFUSED, openapi_extra=OPTIONS_BODY)
    async def set_options(request: Request) -> None:
        """Accepts what is set already: nothing here is shared between requests."""
        now = await options()
        for name, value in (await read_object(request, service.settings)).items():
            if name not in now or now[name] != value:
                message = (
                    "Options cannot be changed here, where nothing is shared between requests; a request chooses "
                    "its model by override_settings.sd_model_checkpoint."
                )
                raise InvalidRequestError("unsupported_value", message, param="options")

    @router.head("/samplers", include_in_schema=False)
    @router.get("/samplers")
    async def samplers() -> list[dict[str, Any]]:
        """The samplers some student was trained for."""
        names = {student.sampler for model in service.catalogue for student in model.manifest.students}
        return [{"name": name, "aliases": [], "options": {}} for name in sorted(names)]

    @router.head("/schedulers", include_in_schema=False)
    @router.get("/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        """The schedule is the student's own."""
        return [{"name": "automatic", "label": "Automatic", "aliases": None}]

    @router.head("/scripts", include_in_schema=False)
    @router.get("/scripts")
    async def scripts() -> dict[str, list[str]]:
        """None."""
        return {"txt2img": [], "img2img": []}

    @router.head("/sd-models", include_in_schema=False)
    @router.get("/sd-models")
    async def models() -> list[dict[str, Any]]:
        """The models on offer."""
        blank = {"hash": None, "sha256": None, "config": None}
        names = [model.name for model in service.catalogue]
        return [{"title": name, "model_name": name, "filename": name, **blank} for name in names]

    return router
