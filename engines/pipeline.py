"""A bundle on one backend: condition → steps → decode, each a batched call over rows.

A ``Row`` is one image in the making. Rows of the same ``batch_key`` share a step whatever their guidance,
seed, sampler position or task; ``Pipeline.step`` advances each by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.backends.base import EngineBackend
from engines.bundle import Bundle
from engines.condition import Tokenizer, load_tokenizer
from engines.cost import CostTable
from engines.errors import RequestError
from engines.examples import example_inputs
from engines.guidance import weight_from_scale
from engines.manifest import (
    CLEAN_ESTIMATE,
    COEFFICIENTS,
    CONDITION,
    CONDITION_GRAPH,
    DECODE_GRAPH,
    GRID,
    GUIDANCE,
    IMAGE,
    KNOWN,
    LATENT,
    MASK,
    NEXT_LATENT,
    NOISE,
    TIMESTEP,
    TOKENS,
    BundleManifest,
    Size,
    StudentSpec,
)
from engines.noise import Purpose, row_noise
from engines.sampler import Sampler, SamplerPlan

Floats = NDArray[np.float32]

RUNGS = (1, 2, 4, 8, 16, 32)
"""Batch sizes to be ready for, unless told otherwise."""


@dataclass(eq=False)
class Row:
    """One image in the making; ``Pipeline.step`` advances it.

    latent, clean: (C, h, w) current latent and last clean estimate; known, mask: (C, h, w) and (1, h, w),
    mask 1 where the image is generated; position: steps done.
    """

    student: StudentSpec
    plan: SamplerPlan
    seed: int
    w: float
    condition: Floats
    latent: Floats
    initial_noise: Floats
    known: Floats
    mask: Floats
    clean: Floats
    position: int = 0

    @property
    def batch_key(self) -> tuple[str, tuple[int, ...]]:
        """Rows with equal keys share a step: (step graph, latent shape)."""
        return self.student.graph, self.latent.shape

    @property
    def done(self) -> bool:
        return self.position == len(self.plan)

    @property
    def steps_left(self) -> int:
        return len(self.plan) - self.position


class Pipeline:
    """All graphs of a verified bundle on loaded engines.

    rungs: the ladder of batch sizes that were warmed; a batch is padded up to the next rung. costs: what a call
    takes at each rung, once measured (``engines.open``).
    """

    def __init__(self, bundle: Bundle, load: Callable[[str], EngineBackend], rungs: Sequence[int] = RUNGS) -> None:
        self.bundle = bundle
        self.rungs = tuple(sorted(rungs))
        self.tokenizer: Tokenizer = load_tokenizer(bundle)
        self.costs: CostTable | None = None
        self._engines = {name: load(name) for name in self.manifest.graphs}

    @property
    def manifest(self) -> BundleManifest:
        return self.bundle.manifest

    @property
    def engine_name(self) -> str:
        """The step engine, as responses report it."""
        return self._engines[self.manifest.students[0].graph].name

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
        return self._run(CONDITION_GRAPH, {TOKENS: tokens})[CONDITION]

    def start(
        self, condition: Floats, guidance_scale: float, seed: int, student: StudentSpec, size: Size | None = None
    ) -> Row:
        """A text-to-image row at pure noise. condition: (T, D)."""
        at = size or self.manifest.sizes[0]
        shape = (self.manifest.latent.channels, at.latent_height, at.latent_width)
        noise = row_noise(seed, shape, Purpose.INITIAL)
        return Row(
            student=student,
            plan=self.manifest.plan(student),
            seed=seed,
            w=weight_from_scale(guidance_scale),
            condition=condition,
            latent=noise,
            initial_noise=noise,
            known=np.zeros(shape, np.float32),
            mask=np.ones((1, *shape[1:]), np.float32),
            clean=np.zeros(shape, np.float32),
        )

    def step(self, rows: Sequence[Row]) -> None:
        """Advance every row by one denoising step. rows: one batch_key, at most max_rows."""
        graph = rows[0].student.graph
        out = self._run(graph, self._inputs(graph, rows))
        for i, row in enumerate(rows):
            row.latent, row.clean = out[NEXT_LATENT][i], out[CLEAN_ESTIMATE][i]
            row.position += 1

    def decode(self, latents: Sequence[Floats]) -> NDArray[np.uint8]:
        """(B, H, W, 3) uint8 images of clean latents, each (C, h, w), all of one shape."""
        return self._run(DECODE_GRAPH, {LATENT: np.stack(latents)})[IMAGE]

    def generate(
        self,
        prompts: Sequence[str],
        guidance_scale: float,
        seeds: Sequence[int],
        steps: int | None = None,
        sampler: Sampler | None = None,
    ) -> NDArray[np.uint8]:
        """(B, H, W, 3) images, one a prompt: the plain loop, for tools and tests. At most max_rows prompts."""
        student = self.student(steps, sampler)
        conditions = self.condition(prompts)
        rows = [self.start(c, guidance_scale, seed, student) for c, seed in zip(conditions, seeds, strict=True)]
        while not rows[0].done:
            self.step(rows)
        return self.decode([row.latent for row in rows])

    def warm(self) -> None:
        """Run every graph once at every rung, so that no request pays for a first run."""
        for graph, rung in product(self.manifest.graphs, self.rungs):
            self._engines[graph].run(example_inputs(self.manifest, self.tokenizer, graph, rung))

    def rung(self, n: int) -> int:
        """The smallest rung that holds n rows."""
        return next((rung for rung in self.rungs if rung >= n), n)

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()

    def _inputs(self, graph: str, rows: Sequence[Row]) -> dict[str, NDArray[Any]]:
        steps = [row.plan.steps[row.position] for row in rows]
        inputs: dict[str, NDArray[Any]] = {
            LATENT: np.stack([row.latent for row in rows]),
            TIMESTEP: np.array([step.timestep for step in steps], np.float32),
            GUIDANCE: np.array([row.w for row in rows], np.float32),
            CONDITION: np.stack([row.condition for row in rows]),
            COEFFICIENTS: np.stack([step.row for step in steps]),
            NOISE: np.stack([_step_noise(row) for row in rows]),
            KNOWN: np.stack([row.known for row in rows]),
            MASK: np.stack([row.mask for row in rows]),
        }
        if any(spec.name == GRID for spec in self.manifest.graphs[graph].inputs):
            inputs[GRID] = np.array([row.student.grid for row in rows], np.float32)
        return inputs

    def _run(self, graph: str, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Pad to a rung by repeating the first row, run, and cut the padding off."""
        n = len(next(iter(inputs.values())))
        if n > self.max_rows:
            raise ValueError(f"{n} rows exceed the largest rung, {self.max_rows}")
        pad = self.rung(n) - n
        if pad:
            inputs = {k: np.concatenate([v, np.repeat(v[:1], pad, axis=0)]) for k, v in inputs.items()}
        return {name: array[:n] for name, array in self._engines[graph].run(inputs).items()}


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


def _step_noise(row: Row) -> Floats:
    """Fresh noise where the step adds some; else the initial noise, which re-noises known regions."""
    if row.plan.steps[row.position].stochastic:
        return row_noise(row.seed, row.latent.shape, Purpose.STEP, row.position)
    return row.initial_noise
