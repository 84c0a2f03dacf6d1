"""What a planned fleet is asked for: kinds of requests in their shares, at Poisson times."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
from PIL import Image

from engines.calls import call_of
from engines.cost import CostTable
from engines.manifest import DECODE_GRAPH, ENCODE_GRAPH, BundleManifest, Size, StudentSpec
from engines.pipeline import find_student
from engines.rows import find_encoder
from server.capacity.prices import Prices
from server.capacity.question import Mix, PlanError, PlannedTask
from server.images import write_png
from server.request import DenoiseRequest
from server.resolve import EDIT_STRENGTH


@dataclass(frozen=True, eq=False)
class Kind:
    """Requests that cost the same.

    route: the call (``engines.calls``) of each step of an image, in order; decode, encode: those calls; prompts:
    conditions it needs; seen: its network sees the image without what is generated, which is encoded, too; share:
    of all requests.
    """

    request: DenoiseRequest
    prices: Prices
    route: tuple[str, ...]
    decode: str
    encode: str
    prompts: int
    seen: bool
    share: float

    @property
    def least_s(self) -> float:
        """Engine seconds in the most efficient batches, without its prompts."""
        row_ms = sum(map(self.prices.table.row_ms, (*self.route, self.decode)))
        images = 0 if self.request.image is None else 1 + self.seen
        encode_ms = images * self.prices.table.row_ms(self.encode) if images else 0.0
        return (self.request.n * row_ms + encode_ms) / 1000


@dataclass(eq=False, slots=True)
class Call:
    """One request of the plan. at_s: when it comes; unmade: images that are not decoded yet."""

    at_s: float
    kind: Kind
    new_prompt: bool
    unmade: int


def kinds(models: Sequence[tuple[BundleManifest, CostTable]], mix: Mix) -> list[Kind]:
    """Every combination the mix has of a model, a task, a step count, a size and a number of images.

    Raises: PlanError, RequestError where a model lacks one of them.
    """
    steps: list[tuple[int | None, float]] = [*mix.steps.items()] if mix.steps else [(None, 1.0)]
    sizes: list[tuple[str | None, float]] = [*mix.sizes.items()] if mix.sizes else [(None, 1.0)]
    shares = (mix.tasks.values(), (share for _, share in steps), (share for _, share in sizes), mix.images.values())
    whole = len(models) * math.prod(map(sum, shares))
    found = []
    for manifest, costs in models:
        prices = Prices(costs)
        for (task, a), (count, b), (at, c), (n, d) in product(mix.tasks.items(), steps, sizes, mix.images.items()):
            size = _size(manifest, at)
            found.append(_kind(manifest, prices, task, count, size, n, mix.strength, a * b * c * d / whole))
    return found


def poisson(chosen: Sequence[Kind], rate: float, requests: int, new_prompts: float, seed: int) -> Iterator[Call]:
    """So many calls at ``rate`` a second, the same for the same seed."""
    generator = np.random.default_rng(seed)
    times = np.cumsum(generator.exponential(1 / rate, requests))
    which = generator.choice(len(chosen), requests, p=[kind.share for kind in chosen])
    new = generator.random(requests) < new_prompts
    for at_s, k, is_new in zip(times.tolist(), which.tolist(), new.tolist(), strict=True):
        yield Call(at_s, chosen[k], is_new, chosen[k].request.n)


def _kind(
    manifest: BundleManifest,
    prices: Prices,
    task: PlannedTask,
    steps: int | None,
    size: Size,
    n: int,
    strength: float | None,
    share: float,
) -> Kind:
    student = find_student(manifest, steps)
    fields = _task_fields(manifest, task, student, size, strength)
    request = DenoiseRequest(
        model=manifest.name,
        prompt="",
        n=n,
        seed=0,
        guidance_scale=manifest.guidance.default,
        steps=student.steps,
        sampler=student.sampler,
        width=size.width,
        height=size.height,
        **fields,
    )
    route = (student.graph,) * (request.entry or student.steps)
    if request.encoder_steps is not None:
        route = (find_encoder(manifest, student).graph,) * request.encoder_steps + route
    return Kind(
        request=request,
        prices=prices,
        route=tuple(str(call_of(manifest, graph, size)) for graph in route),
        decode=str(call_of(manifest, DECODE_GRAPH, size)),
        encode=str(call_of(manifest, ENCODE_GRAPH, size)) if ENCODE_GRAPH in manifest.graphs else "",
        prompts=len(request.prompts),
        seen=request.mask is not None and manifest.sees_masks,
        share=share,
    )


def _size(manifest: BundleManifest, wanted: str | None) -> Size:
    """The first where none is wanted. Raises: PlanError."""
    for size in manifest.sizes:
        if wanted in (None, str(size)):
            return size
    offered = ", ".join(map(str, manifest.sizes))
    raise PlanError(f"The model {manifest.name} has no size {wanted}; it has {offered}.")


def _task_fields(
    manifest: BundleManifest, task: PlannedTask, student: StudentSpec, size: Size, strength: float | None
) -> dict[str, Any]:
    """The fields of a request that its task adds. Raises: PlanError, RequestError."""
    if task == "text_to_image":
        return {}
    asked: Literal["edit", "inpaint"] = "inpaint" if task == "inpaint" else "edit"
    if asked not in manifest.tasks:
        raise PlanError(f"The model {manifest.name} has no task {asked}; it has {', '.join(manifest.tasks)}.")
    pixels = (size.width, size.height)
    fields = {"task": asked, "image": write_png(Image.new("RGB", pixels))}
    if task == "invert":
        encoder = find_encoder(manifest, student)
        return {**fields, "mode": "invert", "source_prompt": "", "encoder_steps": encoder.steps}
    if task == "inpaint":
        return {**fields, "mask": write_png(Image.new("L", pixels, 255)), "strength": strength or 1.0}
    return {**fields, "strength": strength or EDIT_STRENGTH}
