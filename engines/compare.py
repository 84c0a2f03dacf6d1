"""Parity: every backend against ONNX Runtime float32 on the same rows, and every row against itself in company."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.backends.base import EngineBackend
from engines.backends.load import (
    BACKENDS,
    OFFERED,
    PrecisionName,
    choose_backend,
    choose_precision,
    load_backend,
)
from engines.bundle import Bundle
from engines.calls import calls
from engines.condition import load_tokenizer
from engines.examples import example_inputs
from engines.measure import Progress

REFERENCE = "onnxruntime"

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Difference:
    """One call on one engine. Errors are absolute, over all outputs; 8-bit images count in levels.

    rows_equal: rows come out bit-equal whatever their batch.
    """

    call: str
    engine: str
    max_abs_error: float
    mean_abs_error: float
    rows_equal: bool
    levels: bool

    def within(self, tolerance: float) -> bool:
        """Whether the graph may serve; one level of an 8-bit image always may differ."""
        return self.rows_equal and self.max_abs_error <= (max(tolerance, 1.0) if self.levels else tolerance)


def compare_backends(
    bundle: Bundle,
    backends: Sequence[str] | None,
    precision: PrecisionName,
    rows: int,
    seed: int,
    progress: Progress | None = None,
    cache_dir: Path | None = None,
) -> list[Difference]:
    """Differences of each backend (None: all installed for CPUs) on every graph, at every size.

    rows: random rows a call, over its students' timesteps and the trained range of w. precision: of backends
    that offer it. cache_dir: of compiled models, as ``load_backend``.
    Raises: BackendError when none does, or the reference or a named backend is not installed.
    """
    tokenizer = load_tokenizer(bundle)
    names = [choose_backend(name) for name in backends or [n for n in BACKENDS if find_spec(n) is not None]]
    if not any(precision in ("auto", *OFFERED[name]) for name in names):
        choose_precision(names[0], precision)  # says who offers it
    at_work: Progress = progress or (lambda call, rows: None)
    differences = []
    for graph, of_graph in groupby(calls(bundle.manifest), key=lambda call: call.graph):
        inputs = {
            call: example_inputs(bundle.manifest, tokenizer, graph, rows, seed, call.size) for call in of_graph
        }
        with closing(load_backend(REFERENCE, bundle, graph)) as reference:
            expected = {call: reference.run(given) for call, given in inputs.items()}
        for name in names:
            offered: PrecisionName = precision if precision in OFFERED[name] else "auto"
            at_work(f"{graph} on {name}", rows)
            with closing(load_backend(name, bundle, graph, precision=offered, cache_dir=cache_dir)) as engine:
                for call, given in inputs.items():
                    at_work(f"{call} on {name}", rows)
                    differences.append(_difference(str(call), engine, given, expected[call]))
    return differences


def _difference(call: str, engine: EngineBackend, inputs: Arrays, expected: Arrays) -> Difference:
    got = engine.run(inputs)
    errors = [np.abs(got[name].astype(np.float64) - want) for name, want in expected.items()]
    return Difference(
        call=call,
        engine=engine.name,
        max_abs_error=max(float(error.max()) for error in errors),
        mean_abs_error=float(np.mean([error.mean() for error in errors])),
        rows_equal=_rows_equal(engine, inputs, got),
        levels=any(want.dtype == np.uint8 for want in expected.values()),
    )


def _rows_equal(engine: EngineBackend, inputs: Arrays, whole: Arrays) -> bool:
    """Rows alone, in halves, and in reverse order, bit for bit."""
    n = len(next(iter(inputs.values())))
    for part in (slice(0, 1), slice(0, n // 2), slice(None, None, -1)):
        alone = engine.run({name: array[part] for name, array in inputs.items()})
        if any(
            alone[name].tobytes() != np.ascontiguousarray(array[part]).tobytes() for name, array in whole.items()
        ):
            return False
    return True
