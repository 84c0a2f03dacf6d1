"""The OpenAPI document: what FastAPI gathers from the routes, and what holds for all of them.

Layers in front of the routes answer too (``guard``, ``gate``); their statuses stand at every operation they can
stop. FastAPI's own 422 is struck out: no route leaves validation to it.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from server.api.a1111_errors import A1111_PATH
from server.api.gate import is_open
from server.schemas import ErrorResponse

_ANY = {
    "415": "The body is compressed",
    "431": "Too many headers, or too long ones",
    "500": "The server failed; its log has the reason under the x-request-id",
}
_WITH_KEYS = {
    "401": "An API key is needed, and this is none",
    "403": "The API key lacks the scope, or its quota never allows so many images",
    "503": "The job store does not answer; Retry-After says when to try again",
}
_SPENDING = {"429": "This API key is used too often; Retry-After says when to try again"}
_ERROR = {"$ref": "#/components/schemas/ErrorResponse"}
_A1111_ERROR = {"$ref": "#/components/schemas/A1111ErrorBody"}
_AUTOMATIC_422 = "HTTPValidationError"


def openapi_document(app: FastAPI) -> dict[str, Any]:
    """Made once; FastAPI serves it at ``/openapi.json``."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            summary=app.summary,
            openapi_version=app.openapi_version,
            routes=app.routes,
        )
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                _complete(operation["responses"], path, method)
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for unused in (_AUTOMATIC_422, "ValidationError"):
            schemas.pop(unused, None)
        schemas.setdefault("ErrorResponse", ErrorResponse.model_json_schema())
        app.openapi_schema = document
    return app.openapi_schema


def _complete(responses: dict[str, Any], path: str, method: str) -> None:
    if _AUTOMATIC_422 in str(responses.get("422")):
        del responses["422"]
    common = dict(_ANY)
    if not is_open(path):
        common |= _WITH_KEYS if method == "get" else _WITH_KEYS | _SPENDING
    for status, description in common.items():
        content = {"application/json": {"schema": _A1111_ERROR if path.startswith(A1111_PATH) else _ERROR}}
        responses.setdefault(status, {"description": description, "content": content})
