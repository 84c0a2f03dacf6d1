"""What passes between a worker and its engine process: frames of JSON with raw arrays behind it, never a pickle.

Frame: 4-byte length of the JSON, 8-byte length of all arrays, JSON, arrays. An array stands in the JSON as its
place and shape; arrays are uint8.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel

from server.jobs import JobFailure
from server.work import Dropped, Event, Failed, Late, Made, Progress, Started, Stepped

HEAD = struct.Struct(">IQ")
MAX_JSON_BYTES = 256 * 1024 * 1024
MAX_ARRAY_BYTES = 4 * 1024 * 1024 * 1024

_EVENTS = {kind.__name__: kind for kind in (Dropped, Failed, Late, Made, Progress, Started, Stepped)}


def frame(body: dict[str, Any], arrays: Sequence[bytes] = ()) -> bytes:
    text = json.dumps(body).encode()
    return b"".join([HEAD.pack(len(text), sum(map(len, arrays))), text, *arrays])


def sizes(head: bytes) -> tuple[int, int]:
    """Lengths of the JSON and of the arrays. Raises: ValueError when they cannot be meant."""
    text, arrays = HEAD.unpack(head)
    if text > MAX_JSON_BYTES or arrays > MAX_ARRAY_BYTES:
        raise ValueError("a frame of the engine process is too large to be one")
    return text, arrays


def events_frame(events: Sequence[Event]) -> bytes:
    arrays: list[bytes] = []
    body = [[type(event).__name__, _plain(event, arrays)] for event in events]
    return frame({"events": body}, arrays)


def events_from(body: list[list[Any]], arrays: memoryview) -> list[Event]:
    """Raises: KeyError, TypeError, ValueError when these are no events."""
    return [_EVENTS[kind](**_rebuilt(fields, arrays)) for kind, fields in body]


def _plain(value: Any, arrays: list[bytes]) -> Any:
    if isinstance(value, np.ndarray):
        at = sum(map(len, arrays))
        arrays.append(np.ascontiguousarray(value, np.uint8).tobytes())
        return {"array": at, "shape": value.shape}
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name), arrays) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item, arrays) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, arrays) for item in value]
    return value


def _rebuilt(value: Any, arrays: memoryview) -> Any:
    if isinstance(value, list):
        return tuple(_rebuilt(item, arrays) for item in value)
    if not isinstance(value, dict):
        return value
    if "array" in value:
        shape, at = value["shape"], value["array"]
        length = int(np.prod(shape))
        return np.frombuffer(arrays[at : at + length], np.uint8).reshape(shape)
    if "code" in value and "message" in value:
        return JobFailure(**value)
    return {key: _rebuilt(item, arrays) for key, item in value.items()}
