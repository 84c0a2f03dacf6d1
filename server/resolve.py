"""From a valid body to a complete request: defaults filled in, every value checked against the model."""

from __future__ import annotations

import secrets
from typing import TypeVar

from engines.errors import RequestError
from engines.noise import MAX_SEED
from engines.pipeline import find_student
from server.catalogue import Catalogue, Model
from server.errors import InvalidRequestError
from server.prompts import check_prompt
from server.request import DenoiseRequest
from server.schemas import GenerationBody

ValueT = TypeVar("ValueT", int, float)


def resolve(body: GenerationBody, catalogue: Catalogue) -> DenoiseRequest:
    """Raises: InvalidRequestError or NotFoundError naming the field and the values it may have."""
    model = catalogue.find(body.model)
    _check_prompt(body, model)
    _check_combinations(body)
    steps = _one("steps", body.steps, "num_inference_steps", body.num_inference_steps)
    guidance = _one("guidance_scale", body.guidance_scale, "guidance", body.guidance)
    n = body.n or 1
    try:
        student = find_student(model.manifest, steps, body.sampler)
    except RequestError as error:
        raise InvalidRequestError(error.code, str(error), param=error.param) from None
    width, height = _size(body.size, model)
    return DenoiseRequest(
        model=model.name,
        prompt=body.prompt,
        n=n,
        seed=_seed(body.seed, n),
        guidance_scale=_guidance(guidance, model),
        steps=student.steps,
        sampler=student.sampler,
        width=width,
        height=height,
        output_format=body.output_format or "png",
        output_compression=body.output_compression,
        partial_images=body.partial_images or 0,
    )


def _check_prompt(body: GenerationBody, model: Model) -> None:
    check_prompt(body.prompt)
    try:
        model.tokenizer.encode(body.prompt)
    except RequestError as error:
        raise InvalidRequestError(error.code, str(error), param=error.param) from None


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


def _one(name: str, value: ValueT | None, alias: str, other: ValueT | None) -> ValueT | None:
    """The value of a field with two names."""
    if value is not None and other is not None and value != other:
        message = f"{name} and {alias} are two names of one field and differ; send one of them."
        raise InvalidRequestError("conflicting_fields", message, param=alias)
    return other if value is None else value


def _guidance(value: float | None, model: Model) -> float:
    allowed = model.manifest.guidance
    if value is None:
        return allowed.default
    if not allowed.min <= value <= allowed.max:
        message = f"guidance_scale must be {allowed.min:g} to {allowed.max:g} for this model (1 is guidance off)."
        raise InvalidRequestError("out_of_range", message, param="guidance_scale")
    return value


def _size(text: str | None, model: Model) -> tuple[int, int]:
    if text in (None, "auto"):
        size = model.manifest.sizes[0]
        return size.width, size.height
    found = model.size(text)
    if found is None:
        allowed = ", ".join(str(size) for size in model.manifest.sizes)
        raise InvalidRequestError("out_of_range", f"size must be auto or {allowed}.", param="size")
    return found.width, found.height


def _seed(seed: int | None, n: int) -> int:
    highest = MAX_SEED - (n - 1)
    if seed is None:
        return secrets.randbelow(highest + 1)
    if seed > highest:
        raise InvalidRequestError("out_of_range", f"seed must be 0 to {highest} for n = {n}.", param="seed")
    return seed
