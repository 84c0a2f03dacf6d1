"""What the OpenAPI document says beyond what the code's types say: bodies read by hand, errors, examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from server.schemas import (
    CompletedEvent,
    EditBody,
    ErrorResponse,
    GenerationBody,
    ImagesResponse,
    PartialImageEvent,
)

_EXAMPLES: list[Any] = GenerationBody.model_json_schema()["examples"]

GENERATION_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": GenerationBody.model_json_schema(),
                "examples": {
                    "smallest": {"summary": "One image, everything else default", "value": _EXAMPLES[0]},
                    "guided": {"summary": "Four images, reproducible", "value": _EXAMPLES[1]},
                    "stream": {"summary": "Server-sent events, as WebP", "value": _EXAMPLES[2]},
                },
            }
        },
    }
}


def error_response(description: str, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    kind = "server_error" if code in {"queue_full", "engine_error"} else "invalid_request_error"
    example = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return {
        "model": ErrorResponse,
        "description": description,
        "content": {"application/json": {"example": example}},
    }


def component(schema: type[BaseModel]) -> dict[str, str]:
    """Where the document has the schema of a body."""
    return {"$ref": f"#/components/schemas/{schema.__name__}"}


def events_content(events: Mapping[str, type[BaseModel]]) -> dict[str, Any]:
    """Server-sent events by name; ``data`` is JSON, and an error has no name.

    As OpenAPI 3.2 tells of them, in an extension: generators of clients read 3.1, which forbids ``itemSchema``.
    """
    schemas: list[type[BaseModel]] = [*dict.fromkeys(events.values()), ErrorResponse]
    bodies = [component(schema) for schema in schemas]
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": bodies}}
    properties = {"event": {"enum": list(events)}, "id": {"type": "string"}, "data": data}
    event = {"type": "object", "properties": properties, "required": ["data"]}
    return {"text/event-stream": {"x-itemSchema": event}}


def _image_events(of: str) -> dict[str, type[BaseModel]]:
    return {f"{of}.partial_image": PartialImageEvent, f"{of}.completed": CompletedEvent}


GENERATION_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ImagesResponse,
        "description": "The images, or with stream true these events: "
        + ", ".join(str(event.model_fields["type"].default) for event in (PartialImageEvent, CompletedEvent)),
        "content": events_content(_image_events("image_generation")),
    },
    400: error_response(
        "A field is unknown, malformed, or asks for what the model does not offer; or every image was withheld",
        "out_of_range",
        "steps must be one this model was distilled for: 1, 2, 4, 8.",
        "steps",
    ),
    404: error_response(
        "No such model", "model_not_found", "There is no such model here; model can be emoji.", "model"
    ),
    408: error_response("The body came too slowly", "body_timeout", "The body did not arrive within 30 s."),
    413: error_response("The body is too large", "payload_too_large", "The body must be at most 1048576 bytes."),
    415: error_response("The body is not plain JSON", "unsupported_media_type", "The body must be JSON."),
    500: error_response("The engine failed on this request", "engine_error", "The engine failed on this request."),
    503: error_response(
        "No room now; Retry-After says when", "queue_full", "The server has as much work as it accepts."
    ),
}


def _edit_form() -> dict[str, Any]:
    schema = EditBody.model_json_schema()
    schema.pop("examples", None)
    file = {"type": "string", "format": "binary"}
    images = {
        "image": {**file, "description": "PNG, JPEG or WebP; cut about its centre to the size. Also image[]."},
        "mask": {**file, "description": "A PNG as large as the image; alpha 0 is drawn anew, the rest stays."},
    }
    required = ["image", *schema["required"]]
    return {**schema, "properties": {**images, **schema["properties"]}, "required": required}


EDIT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": _edit_form(),
                "examples": {
                    "edit": {
                        "summary": "As curl -F takes it; the files with @",
                        "value": {"image": "@photo.png", "prompt": "fox", "strength": "0.75"},
                    },
                    "inpaint": {
                        "summary": "Drawn anew where the mask is transparent",
                        "value": {"image": "@photo.png", "mask": "@mask.png", "prompt": "pizza"},
                    },
                },
            }
        },
    }
}

EDIT_RESPONSES: dict[int | str, dict[str, Any]] = {
    **GENERATION_RESPONSES,
    200: {
        **GENERATION_RESPONSES[200],
        "description": "The images, or with stream true events: image_edit.partial_image, image_edit.completed",
        "content": events_content(_image_events("image_edit")),
    },
    400: error_response(
        "A field or file is unknown, malformed, or asks for what is not offered; or every image was withheld",
        "empty_mask",
        "mask has nothing to edit.",
        "mask",
    ),
    413: error_response(
        "A file, a text or the form is too large", "image_too_large", "image is too large.", "image"
    ),
    415: error_response(
        "The body is no form, or a file no PNG, JPEG or WebP",
        "unsupported_image_type",
        "image must be a PNG, JPEG or WebP file, whatever its name.",
        "image",
    ),
}

MODEL_RESPONSES: dict[int | str, dict[str, Any]] = {404: GENERATION_RESPONSES[404]}
