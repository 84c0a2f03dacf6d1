"""The batched calls of the engine thread, with a failure kept to the row that caused it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray

from engines.errors import BackendError, RequestError
from engines.masks import hide
from engines.pipeline import Pipeline
from engines.rows import Floats, Row
from server.images import read_image, read_mask
from server.jobs import JobFailedError, JobFailure
from server.request import find_size
from server.work import Encoded, Work

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

CONDITION_CACHE_ENTRIES = 1024
CONDITION_CACHE_BYTES = 64 * 1024 * 1024
"""Of one model: some 280 prompts of SD 1.5, 106 of SDXL."""

_log = structlog.get_logger()


class NonFiniteRowError(BackendError):
    """A row became NaN or infinite; its companions did not."""


def isolate(
    items: Sequence[ItemT], call: Callable[[Sequence[ItemT]], Sequence[ResultT]]
) -> list[ResultT | Exception]:
    """``call`` on all items at once; when that raises, on each alone, so only the culprits fail."""
    try:
        return list(call(items))
    except Exception as error:  # whatever an engine raises must not take the companions down
        if len(items) == 1:
            return [error]
    return [result for item in items for result in isolate([item], call)]


def failure_of(error: Exception) -> JobFailure:
    """What the client is told; the details are logged, not sent."""
    if isinstance(error, JobFailedError):
        return error.failure
    if isinstance(error, RequestError):
        return JobFailure(code=error.code, message=str(error))
    _log.error("row_failed", error=type(error).__name__, detail=str(error))
    if isinstance(error, NonFiniteRowError):
        message = "The model produced no usable image for this request; another seed or guidance_scale may."
        return JobFailure(code="non_finite", message=message)
    return JobFailure(code="engine_error", message="The engine failed on this request; the server's log says why.")


class Conditions:
    """Prompt embeddings of one pipeline, the most recent kept: up to so many entries and bytes."""

    def __init__(
        self,
        pipeline: Pipeline,
        max_entries: int = CONDITION_CACHE_ENTRIES,
        max_bytes: int = CONDITION_CACHE_BYTES,
    ) -> None:
        self._pipeline = pipeline
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._cache: OrderedDict[str, Floats] = OrderedDict()
        self._bytes = 0

    def get(self, prompts: Sequence[str]) -> dict[str, Floats | Exception]:
        """(T, D) of every distinct prompt, or why it has none; the misses run as one batch."""
        found: dict[str, Floats | Exception] = {}
        missing = []
        for prompt in dict.fromkeys(prompts):
            if prompt in self._cache:
                self._cache.move_to_end(prompt)
                found[prompt] = self._cache[prompt]
            else:
                missing.append(prompt)
        size = self._pipeline.max_rows
        for start in range(0, len(missing), size):
            chunk = missing[start : start + size]
            found.update(zip(chunk, isolate(chunk, self._encode), strict=True))
        for prompt in missing:
            self._remember(prompt, found[prompt])
        return found

    def _encode(self, prompts: Sequence[str]) -> list[Floats]:
        """Copies, as a view would keep the whole batch in memory."""
        return [condition.copy() for condition in self._pipeline.condition(prompts)]

    def _remember(self, prompt: str, condition: Floats | Exception) -> None:
        if isinstance(condition, Exception):
            return
        self._cache[prompt] = condition
        self._bytes += condition.nbytes
        while len(self._cache) > self._max_entries or self._bytes > self._max_bytes:
            self._bytes -= self._cache.popitem(last=False)[1].nbytes


def encode_images(pipeline: Pipeline, works: Sequence[Work]) -> dict[str, Encoded | Exception]:
    """By token, the clean latents of every job that brought an image, or why there are none."""
    found: dict[str, Encoded | Exception] = {}
    by_size: dict[str, list[Work]] = {}
    for work in works:
        if work.request.image is None:
            continue
        try:
            by_size.setdefault(str(find_size(pipeline.manifest, work.request)), []).append(work)
        except RequestError as error:
            found[work.token] = error

    def call(batch: Sequence[Work]) -> list[Encoded]:
        known = pipeline.encode([read_image(work.request.image or b"") for work in batch])
        seen = _encode_seen(pipeline, batch)
        return [Encoded(latent, seen.get(work.token)) for latent, work in zip(known, batch, strict=True)]

    for group in by_size.values():
        for start in range(0, len(group), pipeline.max_rows):
            chunk = group[start : start + pipeline.max_rows]
            found.update(zip((work.token for work in chunk), isolate(chunk, call), strict=True))
    return found


def _encode_seen(pipeline: Pipeline, works: Sequence[Work]) -> dict[str, Floats]:
    """By token, what a network that sees masks sees of the image of every inpainting; all of one size."""
    masked = [work for work in works if work.request.mask is not None] if pipeline.manifest.sees_masks else []
    if not masked:
        return {}
    size = find_size(pipeline.manifest, masked[0].request)
    hidden = [hide(read_image(w.request.image or b""), read_mask(w.request.mask or b""), size) for w in masked]
    return dict(zip((work.token for work in masked), pipeline.encode(hidden), strict=True))


def step_rows(pipeline: Pipeline, rows: Sequence[Row]) -> list[Exception | None]:
    """Advance rows of one batch key by one step; per row what went wrong, or None."""

    def call(batch: Sequence[Row]) -> list[Exception | None]:
        pipeline.step(batch)
        return [
            None if np.isfinite(row.latent).all() else NonFiniteRowError("a latent is not finite") for row in batch
        ]

    return isolate(rows, call)


def decode_latents(pipeline: Pipeline, latents: Sequence[Floats]) -> list[NDArray[np.uint8] | Exception]:
    """(H, W, 3) uint8 per latent of one shape, or what went wrong."""
    return isolate(latents, lambda batch: list(pipeline.decode(batch)))
