"""What the served toy model adds to the document, so that fuzzed requests get past the first rule and draw images.

Schemathesis imports this module. It narrows the document to the model (prompts, steps, guidance, sizes), which the
document of a server cannot know, and gives it picture files, good and broken.
"""

from __future__ import annotations

import base64
from typing import Any

import schemathesis
from hypothesis import strategies as st

from tests.support.pictures import file_of, mask_file, photo, png_claiming
from tests.support.toy_bundle import DIGITS

NARROWED: dict[str, dict[str, Any]] = {
    "prompt": {"enum": [*DIGITS, "a three", "the digit 4"]},
    "steps": {"enum": [1, 2, 4, 8]},
    "guidance_scale": {"minimum": 1, "maximum": 5},
    "size": {"enum": ["auto", "64x64"]},
    "model": {"enum": ["toy-digits"]},
}
PICTURES = {"image": "picture", "mask": "picture", "init_images": "picture"}
FILES = (
    file_of(photo()),
    file_of(photo((80, 40), seed=1), "JPEG"),
    file_of(photo((33, 70), seed=2, mode="L"), "WEBP"),
    mask_file(),
    file_of(photo())[:-40],
    png_claiming(20_000, 20_000),
    b"GIF89a",
)


@schemathesis.hook
def before_load_schema(context: Any, raw_schema: dict[str, Any]) -> None:
    for operations in raw_schema["paths"].values():
        for operation in operations.values():
            for media_type, content in operation.get("requestBody", {}).get("content", {}).items():
                fields = content["schema"].get("properties", {})
                for name in set(fields) & {*NARROWED, *PICTURES}:
                    fields[name] = _field(name, media_type, fields[name])


def _field(name: str, media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    if name in NARROWED:
        narrowed = {"type": schema.get("type") or schema["anyOf"][0]["type"], **NARROWED[name]}
        return narrowed if "type" in schema else {"anyOf": [narrowed, {"type": "null"}]}
    if media_type == "multipart/form-data":
        return {"type": "string", "format": "picture-file"}
    picture = {"type": "string", "format": "picture-text"}
    return {"type": "array", "items": picture, "maxItems": 1} if schema.get("type") == "array" else picture


_files = st.sampled_from(FILES) | st.binary(max_size=64)
schemathesis.openapi.format("picture-file", _files)
schemathesis.openapi.format("picture-text", _files.map(lambda file: base64.b64encode(file).decode()))
