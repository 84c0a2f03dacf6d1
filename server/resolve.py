"""From a valid body to a complete request: defaults filled in, every value checked against the model."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, TypeVar

from engines.errors import RequestError
from engines.manifest import Size, StudentSpec, Task
from engines.noise import MAX_SEED
from engines.pipeline import find_student
from engines.rows import find_encoder
from server.catalogue import Catalogue, Model
from server.errors import InvalidRequestError, renamed
from server.fitting import Fit, MaskRule, fit_image, nearest_size
from server.prompts import check_prompt
from server.request import DenoiseRequest
from server.schemas import EditBody, GenerationBody

EDIT_STRENGTH = 0.75
"""Of an edit without a mask that names none."""

ValueT = TypeVar("ValueT", int, float)


def resolve(body: GenerationBody, catalogue: Catalogue) -> DenoiseRequest:
    """Raises: InvalidRequestError or NotFoundError naming the field and the values it may have."""
    model = catalogue.find(body.model)
    width, height = _size(body.size, model)
    return DenoiseRequest(**_shared(body, model), width=width, height=height)


@dataclass(frozen=True)
class Edit:
    """An edit or inpainting as far as it is known before its files are decoded.

    outline: the request without them, at the first of ``sizes``, those its image may be brought to.
    """

    outline: DenoiseRequest
    sizes: tuple[Size, ...]

    def with_files(
        self, image: bytes, mask: bytes | None, rule: MaskRule, *, fit: Fit = "crop", invert: bool = False
    ) -> DenoiseRequest:
        """The whole request. Decodes the files, so call it beside the event loop.

        rule: what of the mask is edited, the rest with invert; fit: how the image comes to the size.
        Raises: as ``fit_image``.
        """

        def choose(width: int, height: int) -> Size:
            return nearest_size(self.sizes, width, height)

        fitted = fit_image(image, mask, rule, choose, fit=fit, invert=invert)
        found = {
            "width": fitted.size.width,
            "height": fitted.size.height,
            "image": fitted.image,
            "mask": fitted.mask,
        }
        return DenoiseRequest(**(dict(self.outline) | found))


def resolve_edit(body: EditBody, catalogue: Catalogue, *, masked: bool) -> Edit:
    """An edit, or masked an inpainting. Raises: as ``resolve``."""
    model = catalogue.find(body.model)
    task: Task = "inpaint" if masked else "edit"
    if task not in model.manifest.tasks:
        offered = ", ".join(model.manifest.tasks)
        message = f"This model has no task {task}; it has {offered}."
        raise InvalidRequestError("unsupported_value", message, param="model")
    shared = _shared(body, model)
    student = find_student(model.manifest, shared["steps"], shared["sampler"])
    entry = _entry(body, model, student, masked=masked)
    sizes = model.manifest.sizes if body.size in (None, "auto") else (_found_size(body.size or "", model),)
    # Not validated before its files are there, which its task requires.
    outline = DenoiseRequest.model_construct(
        **shared, **entry, task=task, width=sizes[0].width, height=sizes[0].height
    )
    return Edit(outline, sizes)


def _shared(body: GenerationBody, model: Model) -> dict[str, Any]:
    """The fields of a request that every task has."""
    _check_prompt("prompt", body.prompt, model)
    _check_combinations(body)
    steps_name, steps = _one("steps", body.steps, "num_inference_steps", body.num_inference_steps)
    guidance = _one("guidance_scale", body.guidance_scale, "guidance", body.guidance)
    n = body.n or 1
    try:
        student = find_student(model.manifest, steps, body.sampler)
    except RequestError as error:
        param = steps_name if error.param == "steps" else error.param
        raise InvalidRequestError(error.code, renamed(str(error), error.param, param), param=param) from None
    return {
        "model": model.name,
        "prompt": body.prompt,
        "n": n,
        "seed": _seed(body.seed, n),
        "guidance_scale": _guidance(*guidance, model),
        "steps": student.steps,
        "sampler": student.sampler,
        "output_format": body.output_format or "png",
        "output_compression": body.output_compression,
        "partial_images": body.partial_images or 0,
        "stored": body.response_format == "url",
    }


def _entry(body: EditBody, model: Model, student: StudentSpec, *, masked: bool) -> dict[str, Any]:
    """How an edit enters the steps."""
    if body.mode != "invert":
        for name in ("source_prompt", "encoder_steps"):
            if getattr(body, name) is not None:
                message = f"{name} belongs to mode invert; leave it out, or set mode to invert."
                raise InvalidRequestError("unsupported_value", message, param=name)
        strength = body.strength if body.strength is not None else (1.0 if masked else EDIT_STRENGTH)
        if strength == 0:
            message = "strength must be above 0: at 0 the image would stay as it is."
            raise InvalidRequestError("out_of_range", message, param="strength")
        return {"strength": strength}
    if masked or body.strength is not None:
        param = "mask" if masked else "strength"
        message = f"{param} does not go with mode invert, which starts from the whole image's own noise."
        raise InvalidRequestError("unsupported_value", message, param=param)
    if body.source_prompt is None:
        message = "source_prompt is required with mode invert: it says what the image shows."
        raise InvalidRequestError("missing_field", message, param="source_prompt")
    _check_prompt("source_prompt", body.source_prompt, model)
    try:
        encoder = find_encoder(model.manifest, student, body.encoder_steps)
    except RequestError as error:
        raise InvalidRequestError(error.code, str(error), param=error.param) from None
    return {"mode": "invert", "source_prompt": body.source_prompt, "encoder_steps": encoder.steps}


def _check_prompt(name: str, prompt: str, model: Model) -> None:
    check_prompt(prompt, name)
    try:
        model.tokenizer.encode(prompt)
    except RequestError as error:
        raise InvalidRequestError(error.code, renamed(str(error), "prompt", name), param=name) from None


def _check_combinations(body: GenerationBody) -> None:
    if body.negative_prompt:
        message = (
            "negative_prompt is not supported: guidance was distilled against the empty prompt; "
            "say what you want in the prompt instead."
        )
        raise InvalidRequestError("unsupported_value", message, param="negative_prompt")
    if body.output_compression is not None and (body.output_format or "png") == "png":
        message = "output_compression needs output_format jpeg or webp: PNG loses nothing."
        raise InvalidRequestError("unsupported_value", message, param="output_compression")
    if body.partial_images and not body.stream:
        message = "partial_images needs stream true: previews are sent as events."
        raise InvalidRequestError("unsupported_value", message, param="partial_images")


def _one(name: str, value: ValueT | None, alias: str, other: ValueT | None) -> tuple[str, ValueT | None]:
    """The name that a field with two was sent under, and its value."""
    if value is not None and other is not None and value != other:
        message = f"{name} and {alias} are two names of one field and differ; send one of them."
        raise InvalidRequestError("conflicting_fields", message, param=alias)
    return (alias, other) if value is None and other is not None else (name, value)


def _guidance(name: str, value: float | None, model: Model) -> float:
    allowed = model.manifest.guidance
    if value is None:
        return allowed.default
    if not allowed.min <= value <= allowed.max:
        message = f"{name} must be {allowed.min:g} to {allowed.max:g} for this model (1 is guidance off)."
        raise InvalidRequestError("out_of_range", message, param=name)
    return value


def _size(text: str | None, model: Model) -> tuple[int, int]:
    size = model.manifest.sizes[0] if text in (None, "auto") else _found_size(text or "", model)
    return size.width, size.height


def _found_size(text: str, model: Model) -> Size:
    found = model.size(text)
    if found is None:
        allowed = ", ".join(str(size) for size in model.manifest.sizes)
        raise InvalidRequestError("out_of_range", f"size must be auto or {allowed}.", param="size")
    return found


def _seed(seed: int | None, n: int) -> int:
    highest = MAX_SEED - (n - 1)
    if seed is None:
        return secrets.randbelow(highest + 1)
    if seed > highest:
        raise InvalidRequestError("out_of_range", f"seed must be 0 to {highest} for n = {n}.", param="seed")
    return seed
