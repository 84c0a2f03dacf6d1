"""Reading a multipart form while it arrives: every limit holds before the bytes are kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from server.api.body import client_gone
from server.api.validation import PLAIN_NAME
from server.errors import ApiError, InvalidRequestError
from server.images import MAX_IMAGE_BYTES, image_too_large

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FILES = {"image": "image", "image[]": "image", "mask": "mask"}
"""Parts that are files, and the field each stands for."""

MAX_PARTS = 64
MAX_TEXT_BYTES = 64 * 1024
_MAX_OVERHEAD = 1024 * 1024
_AS_IT_IS = (b"binary", b"8bit", b"7bit")


@dataclass
class Form:
    """texts, files: by field. An empty text is a field left out, and so is an empty file without a name."""

    texts: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


async def read_form(request: Request) -> Form:
    """The form a client sent; file names and types are discarded.

    Raises: ApiError 413 (a part or their number), 415 (no form); InvalidRequestError for a broken or repeated part.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        message = "The body must be a form: send it as multipart/form-data, with the image as a file."
        raise ApiError(415, "unsupported_media_type", message)
    most = 2 * MAX_IMAGE_BYTES + _MAX_OVERHEAD
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > most:
        raise ApiError(413, "payload_too_large", f"The body must be at most {most} bytes.")
    reader = _Reader()
    try:
        boundary = options.get(b"boundary", b"")
        if not boundary:
            message = "The Content-Type has no boundary: let your client set this header by itself."
            raise InvalidRequestError("invalid_multipart", message)
        parser = MultipartParser(boundary, reader.callbacks(), max_size=most)
        async for chunk in request.stream():
            if parser.write(chunk) < len(chunk):
                raise ApiError(413, "payload_too_large", f"The body must be at most {most} bytes.")
    except ClientDisconnect:
        raise client_gone() from None
    except FormParserError:
        raise _broken() from None
    if not reader.ended:
        raise _broken()
    return reader.form


class _Reader:
    """Collects parts as the parser finds them."""

    def __init__(self) -> None:
        self.form = Form()
        self.ended = False
        self._seen: set[str] = set()
        self._header = [bytearray(), bytearray()]
        self._name = ""
        self._named_file = False
        self._data = bytearray()

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._named,
            "on_part_data": self._more,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        if len(self._seen) == MAX_PARTS:
            raise ApiError(413, "too_many_parts", f"A form here has at most {MAX_PARTS} parts.")
        self._name, self._named_file, self._data = "", False, bytearray()

    def _header_end(self) -> None:
        name, value = (bytes(part) for part in self._header)
        self._header = [bytearray(), bytearray()]
        if name.lower() == b"content-disposition":
            options = parse_options_header(value)[1]
            self._name = _utf8(options.get(b"name", b""))
            self._named_file = bool(options.get(b"filename"))
        elif name.lower() == b"content-transfer-encoding" and value.strip().lower() not in _AS_IT_IS:
            message = "A part of the form has a Content-Transfer-Encoding; send it as it is."
            raise InvalidRequestError("invalid_multipart", message)

    def _named(self) -> None:
        if not self._name:
            raise _broken()
        if self._named_file and self._name not in FILES:
            raise _no_file(self._name)
        field_name = FILES.get(self._name, self._name)
        if field_name in self._seen:
            raise _twice(field_name)
        self._seen.add(field_name)

    def _more(self, data: bytes, start: int, end: int) -> None:
        self._data += data[start:end]
        if self._name in FILES:
            if len(self._data) > MAX_IMAGE_BYTES:
                raise image_too_large(FILES[self._name])
        elif len(self._data) > MAX_TEXT_BYTES:
            message = f"A text of a form must be at most {MAX_TEXT_BYTES} bytes."
            raise ApiError(413, "payload_too_large", message, param=_told(self._name))

    def _part_end(self) -> None:
        if self._name in FILES and (self._data or self._named_file):
            self.form.files[FILES[self._name]] = bytes(self._data)
        elif self._data:
            self.form.texts[self._name] = _utf8(bytes(self._data), _told(self._name))

    def _end(self) -> None:
        self.ended = True


def _told(name: str) -> str | None:
    """The name of a field, where an error may repeat it."""
    return name if PLAIN_NAME.fullmatch(name) else None


def _no_file(name: str) -> InvalidRequestError:
    files, told = ", ".join(FILES), _told(name)
    message = f"{'One field' if told is None else told} is no file here; the fields that are: {files}."
    return InvalidRequestError("unknown_field", message, param=told)


def _twice(field_name: str) -> InvalidRequestError:
    param = _told(field_name)
    message = f"The form has two parts of {'one field' if param is None else param}; send it once."
    if param == "image":
        message = "The form has more than one image; send the one that is to be edited."
    return InvalidRequestError("duplicate_part", message, param=param)


def _utf8(data: bytes, param: str | None = None) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidRequestError("invalid_encoding", "The form's texts must be UTF-8.", param=param) from None


def _broken() -> InvalidRequestError:
    return InvalidRequestError("invalid_multipart", "The body is not a whole multipart form.")
