"""A batch of wishes made to its end before the next one starts, on the bundle's own engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engines.masks import latent_mask, paste_known
from engines.pipeline import Pipeline
from engines.rows import Drawing, Floats, Row
from tests.benchmarks.load import Pixels
from tests.benchmarks.wishes import Wish


def make_together(pipeline: Pipeline, wishes: Sequence[Wish]) -> list[Pixels]:
    """All of a batch, in lockstep: a row that is done leaves, nobody joins. wishes: at most max_rows."""
    rows = _rows(pipeline, wishes)
    while alive := [row for row in rows if not row.done]:
        groups: dict[Any, list[Row]] = {}
        for row in alive:
            groups.setdefault(row.batch_key, []).append(row)
        for group in groups.values():
            pipeline.step(group)
    drawn = pipeline.decode([row.latent for row in rows])
    return [
        paste_known(pixels, wish.known(), wish.generated()) if wish.task == "inpaint" else pixels
        for pixels, wish in zip(drawn, wishes, strict=True)
    ]


def _rows(pipeline: Pipeline, wishes: Sequence[Wish]) -> list[Row]:
    conditions = pipeline.condition([wish.prompt for wish in wishes])
    images = [wish.known() for wish in wishes if wish.image is not None]
    encoded = iter(pipeline.encode(images) if images else ())
    known = [None if wish.image is None else next(encoded) for wish in wishes]
    return [_row(pipeline, *of_wish) for of_wish in zip(wishes, conditions, known, strict=True)]


def _row(pipeline: Pipeline, wish: Wish, condition: Floats, known: Floats | None) -> Row:
    drawing = Drawing(pipeline.manifest, pipeline.student(wish.steps), condition, wish.guidance_scale)
    if known is None or wish.strength is None:
        return drawing.from_noise(wish.seed)
    mask = latent_mask(wish.generated(), pipeline.manifest.sizes[0]) if wish.task == "inpaint" else None
    return drawing.from_image(wish.seed, known, wish.strength, mask)
