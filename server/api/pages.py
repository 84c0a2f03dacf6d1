"""The playground and the reference page: static files, no build, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

_WEB = Path(__file__).parent.parent / "web"
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page_routes() -> APIRouter:
    """``/``, ``/docs`` and the files they need, read once."""
    router = APIRouter(include_in_schema=False)
    files = {path.name: path.read_bytes() for path in sorted(_WEB.iterdir()) if path.suffix in _TYPES}
    routes = {f"/static/{name}": name for name in files}
    routes |= {"/": "index.html", "/docs": "docs.html"}
    for route, name in routes.items():
        content, kind = files[name], _TYPES[Path(name).suffix]
        router.add_api_route(route, _page(content, kind), methods=["GET", "HEAD"])
    return router


def _page(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def page() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return page
