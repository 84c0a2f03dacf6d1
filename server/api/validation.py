"""A parsed body against its schema: one error, naming the field and what it may be."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from server.errors import InvalidRequestError
from server.strict_json import MAX_NUMBER_CHARS

ModelT = TypeVar("ModelT", bound=BaseModel)

_DIGITS = f"[0-9]{{1,{MAX_NUMBER_CHARS}}}"
_INTEGER = re.compile(f"-?{_DIGITS}")
_NUMBER = re.compile(rf"[+-]?({_DIGITS}(\.[0-9]{{0,20}})?|\.[0-9]{{1,20}})([eE][+-]?[0-9]{{1,2}})?")
PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
"""Names of fields that an error may repeat, known or not."""
_RANGE_ERRORS = frozenset({"greater_than", "greater_than_equal", "less_than", "less_than_equal"})
_TYPE_WORDS = {
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
}

# Why a whole field is refused: better than "must be null".
_UNSUPPORTED = {
    "style": "style is not supported: describe the style in the prompt, or leave the field out.",
    "quality": "quality must be auto or standard: a distilled model has one; more steps cost time and look better.",
    "background": "background must be auto or opaque: this model makes opaque images.",
    "moderation": "moderation must be auto: there is no other level here.",
}


def validate(schema: type[ModelT], body: dict[str, Any]) -> ModelT:
    """Raises: InvalidRequestError for the first thing wrong; messages never repeat the input."""
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
    raise _refusal(schema, next((d for d in details if _is_unknown(d)), details[0]))


def form_values(schema: type[BaseModel], texts: Mapping[str, str]) -> dict[str, Any]:
    """The texts of a form as JSON would hold them: numbers and booleans by the schema's types.

    What is no number stays text, and ``validate`` then says what its field must be.
    """
    return {name: _value(schema, name, text) for name, text in texts.items()}


def _value(schema: type[BaseModel], name: str, text: str) -> Any:
    info = schema.model_fields.get(name)
    kinds = get_args(info.annotation) if info is not None else ()
    if int in kinds and _INTEGER.fullmatch(text):
        return int(text)
    if float in kinds and _NUMBER.fullmatch(text):
        return float(text)
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    return text


def _refusal(schema: type[BaseModel], detail: ErrorDetails) -> InvalidRequestError:
    kind, param = detail["type"], str(detail["loc"][0]) if detail["loc"] else ""
    if _is_unknown(detail):
        return _unknown_field(schema, param)
    code, message = "out_of_range", f"{param}: {detail['msg']}."
    if kind == "missing":
        code, message = "missing_field", f"{param} is required."
    elif kind in _TYPE_WORDS:
        subject = f"each of {param}" if any(isinstance(part, int) for part in detail["loc"]) else param
        code, message = "invalid_type", f"{subject} must be {_TYPE_WORDS[kind]}."
    elif kind in _RANGE_ERRORS:
        message = f"{param} must be {_range(schema, param)}."
    elif param in _UNSUPPORTED:
        code, message = "unsupported_value", _UNSUPPORTED[param]
    elif kind == "literal_error":
        code, message = "unsupported_value", f"{param} must be {detail['ctx']['expected']}."
    return InvalidRequestError(code, message, param=param)


def _is_unknown(detail: ErrorDetails) -> bool:
    """A field nobody knows, or one whose name is no text (which has no location)."""
    return detail["type"] == "extra_forbidden" or not detail["loc"]


def _unknown_field(schema: type[BaseModel], name: str) -> InvalidRequestError:
    known = ", ".join(schema.model_fields)
    if not PLAIN_NAME.fullmatch(name):
        return InvalidRequestError("unknown_field", f"The body has a field that is not one of: {known}.")
    return InvalidRequestError(
        "unknown_field", f"There is no field {name} here; the fields are: {known}.", param=name
    )


def _range(schema: type[BaseModel], param: str) -> str:
    bounds = schema.model_fields[param].metadata
    low = next((bound.ge for bound in bounds if hasattr(bound, "ge")), None)
    high = next((bound.le for bound in bounds if hasattr(bound, "le")), None)
    return f"at least {low}" if high is None else f"{low} to {high}"
