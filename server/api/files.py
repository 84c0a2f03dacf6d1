"""Files of a result store that is a folder, at signed addresses."""

from __future__ import annotations

from fastapi import APIRouter, Query
from starlette.responses import Response

from server.api.job_reference import FILE
from server.errors import NotFoundError
from server.service import Service


def file_routes(service: Service) -> APIRouter:
    """``/files``."""
    router = APIRouter(prefix="/files", tags=["Files"])

    @router.head("/{slot}/{name}", include_in_schema=False)
    @router.get("/{slot}/{name}", response_class=Response, responses=FILE)
    async def read_file(
        slot: str,
        name: str,
        expires: str = Query("", description="As in the address."),
        signature: str = Query("", description="As in the address."),
    ) -> Response:
        """A finished file, at the address that an answer gave; its signature stands in for an API key."""
        if service.links is None:
            raise NotFoundError("file_not_found", "This server stores no files.")
        data = await service.links.open(f"{slot}/{name}", expires, signature)
        kind = name.rpartition(".")[2]
        return Response(data, media_type=f"image/{kind}", headers={"cache-control": "private"})

    return router
