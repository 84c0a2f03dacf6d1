"""What the OpenAPI document says of AUTOMATIC1111's API beyond what the code's types say."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from server.api.a1111_fields import ImageWish, TextWish


class A1111Answer(BaseModel):
    """Answer of ``txt2img`` and ``img2img``. images: base64; info: JSON, with ``adjusted`` in it."""

    images: list[str]
    parameters: dict[str, Any]
    info: str


class A1111ErrorBody(BaseModel):
    """error: the code; detail: the message; errors: the field at fault."""

    error: str
    detail: str
    body: str
    errors: str


def _refusal(description: str) -> dict[str, Any]:
    return {"model": A1111ErrorBody, "description": description}


def _body(schema: dict[str, Any], example: dict[str, Any]) -> dict[str, Any]:
    content = {"application/json": {"schema": schema, "example": example}}
    return {"requestBody": {"required": True, "content": content}}


REFUSED: dict[int | str, dict[str, Any]] = {
    400: _refusal("The body is not JSON"),
    404: _refusal("No such model"),
    408: _refusal("The body came too slowly"),
    413: _refusal("The body is too large"),
    415: _refusal("The body is not JSON, or an image is of another type"),
    422: _refusal("A field is unknown, malformed or not offered"),
}
DRAWN: dict[int | str, dict[str, Any]] = {
    200: {"model": A1111Answer, "description": "The images"},
    **REFUSED,
    429: _refusal("Too much for this key or tenant; Retry-After says when to try again"),
    500: _refusal("The engine failed on this request"),
    503: _refusal("No room now; Retry-After says when to try again"),
}
TEXT_BODY = _body(TextWish.model_json_schema(), {"prompt": "seven", "steps": 4, "cfg_scale": 2.5, "seed": 1})
IMAGE_BODY = _body(
    {**ImageWish.model_json_schema(), "required": ["init_images"]}, {"prompt": "seven", "init_images": ["iVBORw0…"]}
)
OPTIONS_BODY = _body(
    {
        "type": "object",
        "properties": {
            "sd_model_checkpoint": {"type": "string", "description": "The first model served."},
            "samples_format": {"const": "png"},
        },
        "additionalProperties": False,
    },
    {"samples_format": "png"},
)
