"""The OpenAPI document: what FastAPI gathers from the routes, and what holds for all of them.

Layers in front of the routes answer too (``guard``, ``gate``); their statuses stand at every operation they can
stop. FastAPI's own 422 is struck out: no route leaves validation to it.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from server.api.a1111_errors import A1111_PATH
from server.api.gate import generates, is_open
from server.api.reference import component
from server.job_schemas import JobEventBody
from server.schemas import CompletedEvent, ErrorResponse, PartialImageEvent

_ANY = {
    "415": "The body is compressed",
    "431": "Too many headers, or too long ones",
    "500": "The server failed; its log has the reason under the x-request-id",
}
_WITH_KEYS = {
    "401": "An API key is needed, and this is none",
    "403": "The API key lacks the scope, its quota never allows so many images, or this is sent for a foreign page",
    "503": "The job store does not answer; Retry-After says when to try again",
}
_SPENDING = {"429": "Too much for this key or tenant; Retry-After says when to try again"}
_RETRY_HEADERS = {
    "Retry-After": {"description": "Seconds until then.", "schema": {"type": "integer", "minimum": 1}},
    "retry-after-ms": {"description": "The same in ms.", "schema": {"type": "integer", "minimum": 1}},
}
_SCHEMES = {
    "key": {"type": "http", "scheme": "bearer", "description": "An API key."},
    "password": {"type": "http", "scheme": "basic", "description": "An API key as the password, of any user."},
}
_SECURED: list[dict[str, list[str]]] = [{"key": []}]
_SECURED_A1111: list[dict[str, list[str]]] = [{"key": []}, {"password": []}]
_ERROR = component(ErrorResponse)
_A1111_ERROR = {"$ref": "#/components/schemas/A1111ErrorBody"}
_AUTOMATIC_422 = "HTTPValidationError"


def openapi_document(app: FastAPI, *, keys: bool) -> dict[str, Any]:
    """Made once; FastAPI serves it at ``/openapi.json``. keys: whether an API key is asked for."""
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
                if keys and not is_open(path):
                    operation["security"] = _SECURED_A1111 if path.startswith(A1111_PATH) else _SECURED
        components = document.setdefault("components", {})
        if keys:
            components["securitySchemes"] = _SCHEMES
        schemas = components.setdefault("schemas", {})
        for body in (PartialImageEvent, CompletedEvent, JobEventBody):
            own = body.model_json_schema(mode="serialization", ref_template="#/components/schemas/{model}")
            for name, schema in {**own.pop("$defs", {}), body.__name__: own}.items():
                schemas.setdefault(name, schema)
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
        common |= _WITH_KEYS | (_SPENDING if generates(method.upper(), path) else {})
    for status, description in common.items():
        content = {"application/json": {"schema": _A1111_ERROR if path.startswith(A1111_PATH) else _ERROR}}
        responses.setdefault(status, {"description": description, "content": content})
    for status, response in responses.items():
        if status in ("429", "503") and path != "/readyz":  # whose 503 is no error, but an answer
            response["headers"] = _RETRY_HEADERS
        example = response.get("content", {}).get("application/json", {}).get("example", {})
        if "error" in example:
            example["error"].setdefault("param", None)  # FastAPI drops what is null
