"""From the body of a job to a complete request: the fields of its task, and the files inside the body."""

from __future__ import annotations

from engines.manifest import Task
from server.catalogue import Catalogue
from server.errors import InvalidRequestError
from server.fitting import white_is_edit
from server.images import decode_file
from server.job_schemas import JobBody
from server.request import DenoiseRequest
from server.resolve import Edit, resolve, resolve_edit
from server.schemas import EditBody, GenerationBody

_EDITS: tuple[Task, ...] = ("edit", "inpaint")
_TASKS_OF: dict[str, tuple[Task, ...]] = {
    "image": _EDITS,
    "mask": ("inpaint",),
    "strength": _EDITS,
    "mode": _EDITS,
    "source_prompt": _EDITS,
    "encoder_steps": _EDITS,
}
"""The tasks that have a field; the others refuse it."""

_FILES = ("image", "mask")
"""Required by the tasks that have them."""

_JOB_FIELDS = {"task", "priority", "deadline_ms", "webhook_url"}


def resolve_job(body: JobBody, catalogue: Catalogue) -> DenoiseRequest | Edit:
    """The request, or the edit that ``with_files_of`` completes.

    Raises: InvalidRequestError, NotFoundError as ``resolve`` and ``resolve_edit``; missing_field and
    unsupported_value for a field that the task needs or does not have.
    """
    _check_fields(body)
    texts = body.model_dump(exclude=_JOB_FIELDS | set(_FILES), exclude_none=True)
    if body.image is None:
        return resolve(GenerationBody(**texts, stream=True), catalogue)  # previews are events of the job
    return resolve_edit(EditBody(**texts, stream=True), catalogue, masked=body.mask is not None)


def with_files_of(body: JobBody, edit: Edit) -> DenoiseRequest:
    """Decodes the body's files, so call it beside the event loop. Raises: as ``decode_file`` and ``fit_image``."""
    image = decode_file(body.image or "", "image")
    mask = None if body.mask is None else decode_file(body.mask, "mask")
    return edit.with_files(image, mask, white_is_edit)


def _check_fields(body: JobBody) -> None:
    task = body.task or "text_to_image"
    for name, tasks in _TASKS_OF.items():
        given = getattr(body, name) is not None
        if given and task not in tasks:
            message = f"{name} belongs to task {' and '.join(tasks)}, not to {task}."
            raise InvalidRequestError("unsupported_value", message, param=name)
        if not given and task in tasks and name in _FILES:
            message = f"{name} is required by task {task}: send a file as base64 or a data URL."
            raise InvalidRequestError("missing_field", message, param=name)
