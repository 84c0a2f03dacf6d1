"""A bundle on one backend: condition → steps → decode, each a batched call over rows.

A row (``engines.rows``) is one image in the making. Rows of the same ``batch_key`` share a step whatever their
guidance, seed, sampler position or task; ``Pipeline.step`` advances each by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.backends.base import RUNGS, EngineBackend
from engines.bundle import Bundle
from engines.calls import Call, call_of
from engines.condition import Tokenizer, load_tokenizer
from engines.cost import CostTable
from engines.errors import RequestError
from engines.framing import whole_image
from engines.manifest import (
    CLEAN_ESTIMATE,
    COEFFICIENTS,
    CONDITION,
    CONDITION_GRAPH,
    DECODE_GRAPH,
    ENCODE_GRAPH,
    GRID,
    GUIDANCE,
    IMAGE,
    KNOWN,
    LATENT,
    MASK,
    MASKED,
    NEXT_LATENT,
    NOISE,
    TIME_IDS,
    TIMESTEP,
    TOKENS,
    BundleManifest,
    Size,
    StudentSpec,
)
from engines.masks import blank
from engines.rows import Drawing, Floats, Row
from engines.sampler import Sampler


class Pipeline:
    """All graphs of a verified bundle on loaded engines.

    rungs: the ladder of batch sizes to be ready for; a batch is padded up to the next. costs: what a call takes at
    each rung, once measured (``engines.open``); rungs not worth it, or too large (``engines.cost``), are not run.
    """

    def __init__(self, bundle: Bundle, load: Callable[[str], EngineBackend], rungs: Sequence[int] = RUNGS) -> None:
        self.bundle = bundle
        self._rungs = tuple(sorted(rungs))
        self.tokenizer: Tokenizer = load_tokenizer(bundle)
        self.costs: CostTable | None = None
        self._engines = {name: load(name) for name in self.manifest.graphs}
        self._blanks: dict[Size, Floats] = {}

    @property
    def manifest(self) -> BundleManifest:
        return self.bundle.manifest

    @property
    def rungs(self) -> tuple[int, ...]:
        """Batch sizes that calls are padded to, ascending."""
        return self._rungs if self.costs is None else self.costs.rungs

    @property
    def engine_name(self) -> str:
        """The engine of the steps, as responses report it; each where step graphs differ in precision."""
        return ", ".join(dict.fromkeys(self._engines[student.graph].name for student in self.manifest.students))

    @property
    def max_rows(self) -> int:
        """Most rows one call takes."""
        return self.rungs[-1]

    def engine(self, graph: str) -> EngineBackend:
        """The engine of a graph."""
        return self._engines[graph]

    def wrap_engines(self, wrap: Callable[[str, EngineBackend], EngineBackend]) -> None:
        """Put something around the engine of every graph."""
        self._engines = {graph: wrap(graph, engine) for graph, engine in self._engines.items()}

    def student(self, steps: int | None, sampler: Sampler | None = None) -> StudentSpec:
        """The student trained for these steps. Raises: RequestError naming the trained values."""
        return find_student(self.manifest, steps, sampler)

    def condition(self, prompts: Sequence[str]) -> Floats:
        """(B, T, D) conditions of prompts. Raises: RequestError when one is unknown."""
        tokens = np.stack([self.tokenizer.encode(prompt) for prompt in prompts])
        return self._stage(CONDITION_GRAPH, self.manifest.sizes[0], {TOKENS: tokens})[CONDITION]

    def start(
        self, condition: Floats, guidance_scale: float, seed: int, student: StudentSpec, size: Size | None = None
    ) -> Row:
        """A text-to-image row at pure noise. condition: (T, D). ``Drawing`` has the other ways to begin."""
        masked = self.blank(size or self.manifest.sizes[0])
        return Drawing(self.manifest, student, condition, guidance_scale, masked).from_noise(seed, size)

    def blank(self, size: Size) -> Floats | None:
        """(C, h, w) what the networks see of an image to be drawn as a whole; None where they see no image."""
        if not self.manifest.sees_masks:
            return None
        if size not in self._blanks:
            self._blanks[size] = self.encode([blank(size)])[0]
        return self._blanks[size]

    def next_call(self, row: Row) -> Call:
        """What the row's next step is a call of."""
        return call_of(self.manifest, row.leg.student.graph, self._size(row.latent))

    def step(self, rows: Sequence[Row]) -> None:
        """Advance every row by one denoising step. rows: one batch_key, at most max_rows."""
        graph = rows[0].leg.student.graph
        out = self._run(graph, self._inputs(graph, rows))
        for i, row in enumerate(rows):
            row.latent, row.clean = out[NEXT_LATENT][i], out[CLEAN_ESTIMATE][i]
            row.position += 1

    def encode(self, images: Sequence[NDArray[np.uint8]]) -> Floats:
        """(B, C, h, w) clean latents of images, each (H, W, 3), all of one trained size. Raises: RequestError."""
        if ENCODE_GRAPH not in self._engines:
            message = "this model draws from text only; it takes no image"
            raise RequestError("image", "unsupported_value", message)
        height, width = images[0].shape[:2]
        size = next(size for size in self.manifest.sizes if (size.height, size.width) == (height, width))
        return self._stage(ENCODE_GRAPH, size, {IMAGE: np.stack(images)})[LATENT]

    def decode(self, latents: Sequence[Floats]) -> NDArray[np.uint8]:
        """(B, H, W, 3) uint8 images of clean latents, each (C, h, w), all of one shape."""
        return self._stage(DECODE_GRAPH, self._size(latents[0]), {LATENT: np.stack(latents)})[IMAGE]

    def generate(
        self,
        prompts: Sequence[str],
        guidance_scale: float,
        seeds: Sequence[int],
        steps: int | None = None,
        sampler: Sampler | None = None,
        size: Size | None = None,
    ) -> NDArray[np.uint8]:
        """(B, H, W, 3) images, one a prompt: the plain loop, for tools and tests. At most max_rows prompts."""
        student = self.student(steps, sampler)
        conditions = self.condition(prompts)
        pairs = zip(conditions, seeds, strict=True)
        rows = [self.start(condition, guidance_scale, seed, student, size) for condition, seed in pairs]
        while not rows[0].done:
            self.step(rows)
        return self.decode([row.latent for row in rows])

    def give_up(self, rung: int) -> None:
        """Run no batch of so many rows again, and no larger one."""
        self._rungs = tuple(r for r in self.rungs if r < rung)
        self.costs = None if self.costs is None else self.costs.below(rung)

    def release(self) -> bool:
        """Give back the memory that engines hold between calls; whether any did, and is to be warmed again."""
        gave = [engine.release() for engine in self._engines.values()]
        return any(gave)

    def rung(self, n: int) -> int:
        """The smallest rung that holds n rows."""
        return next((rung for rung in self.rungs if rung >= n), n)

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()

    def _inputs(self, graph: str, rows: Sequence[Row]) -> dict[str, NDArray[Any]]:
        legs, steps = [row.leg for row in rows], [row.step for row in rows]
        inputs: dict[str, NDArray[Any]] = {
            LATENT: np.stack([row.latent for row in rows]),
            TIMESTEP: np.array([step.timestep for step in steps], np.float32),
            GUIDANCE: np.array([leg.w for leg in legs], np.float32),
            CONDITION: np.stack([leg.condition for leg in legs]),
            COEFFICIENTS: np.stack([step.row for step in steps]),
            NOISE: np.stack([row.step_noise() for row in rows]),
            KNOWN: np.stack([row.known for row in rows]),
            MASK: np.stack([row.mask for row in rows]),
        }
        declared = {spec.name for spec in self.manifest.graphs[graph].inputs}
        if GUIDANCE not in declared:
            del inputs[GUIDANCE]
        if GRID in declared:
            inputs[GRID] = np.array([leg.student.grid for leg in legs], np.float32)
        if TIME_IDS in declared:
            inputs[TIME_IDS] = np.stack([whole_image(self._size(row.latent)) for row in rows])
        if MASKED in declared:
            inputs[MASKED] = np.stack([_seen(row) for row in rows])
            del inputs[KNOWN]
        return inputs

    def _size(self, latent: Floats) -> Size:
        cells = latent.shape[1:]
        return next(size for size in self.manifest.sizes if (size.latent_height, size.latent_width) == cells)

    def _stage(self, graph: str, size: Size, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run rows that wait for no others, in the calls that take least time where costs are known."""
        n = len(next(iter(inputs.values())))
        if self.costs is None or n > self.max_rows:
            return self._run(graph, inputs)
        parts, start = [], 0
        for rung in self.costs.split(str(call_of(self.manifest, graph, size)), n):
            parts.append(self._run(graph, {name: rows[start : start + rung] for name, rows in inputs.items()}))
            start += rung
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _run(self, graph: str, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Pad to a rung by repeating the first row, run, and cut the padding off."""
        n = len(next(iter(inputs.values())))
        if n > self.max_rows:
            raise ValueError(f"{n} rows exceed the largest rung, {self.max_rows}")
        pad = self.rung(n) - n
        if pad:
            inputs = {k: np.concatenate([v, np.repeat(v[:1], pad, axis=0)]) for k, v in inputs.items()}
        return {name: array[:n] for name, array in self._engines[graph].run(inputs).items()}


def _seen(row: Row) -> Floats:
    if row.masked is None:
        raise ValueError("this model's networks see the masked image: give Drawing its latent, or Pipeline.blank")
    return row.masked


def find_student(manifest: BundleManifest, steps: int | None, sampler: Sampler | None = None) -> StudentSpec:
    """The student for (steps, sampler), either left out for the default.

    Raises: RequestError naming the trained values.
    """
    wanted = manifest.default_steps if steps is None else steps
    same_steps = [s for s in manifest.students if s.steps == wanted]
    if not same_steps:
        trained = ", ".join(str(n) for n in sorted({s.steps for s in manifest.students}))
        raise RequestError("steps", "out_of_range", f"steps must be one this model was distilled for: {trained}.")
    for student in same_steps:
        if sampler in (None, student.sampler):
            return student
    trained = ", ".join(sorted({s.sampler for s in same_steps}))
    raise RequestError("sampler", "out_of_range", f"sampler must be {trained} for {wanted} steps.")
