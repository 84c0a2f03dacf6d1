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

from engines.backends.base import RUNGS, EngineBackend
from engines.backends.load import (
    BACKENDS,
    INT8,
    OFFERED,
    ON_GPU,
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

    rows_equal: rows come out bit-equal whatever their batch; row_error: the largest error of one in another batch.
    on_gpu: where no bits are promised, for kernels differ by batch size.
    """

    call: str
    engine: str
    max_abs_error: float
    mean_abs_error: float
    rows_equal: bool
    row_error: float
    levels: bool
    on_gpu: bool

    def within(self, tolerance: float) -> bool:
        """Whether the graph may serve; one level of an 8-bit image always may differ."""
        allowed = max(tolerance, 1.0) if self.levels else tolerance
        rows_agree = self.rows_equal or (self.on_gpu and self.row_error <= allowed)
        return rows_agree and self.max_abs_error <= allowed


def compare_backends(
    bundle: Bundle,
    backends: Sequence[str] | None,
    precision: PrecisionName,
    rows: int,
    seed: int,
    progress: Progress | None = None,
    cache_dir: Path | None = None,
    rungs: Sequence[int] = RUNGS,
) -> list[Difference]:
    """Differences of each backend (None: all installed for CPUs that run the bundle) on every graph, at every size.

    rows: random rows a call, over its students' timesteps and the trained range of w. precision: of backends
    that offer it. cache_dir, rungs: of compiled models and batch sizes, as ``load_backend``.
    Raises: BackendError when none does, or the reference or a named backend is not installed.
    """
    tokenizer = load_tokenizer(bundle)
    there = [n for n in BACKENDS if find_spec(n) is not None and (n in INT8 or not bundle.manifest.in_int8)]
    names = [choose_backend(name) for name in backends or there or [REFERENCE]]
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
            loaded = load_backend(name, bundle, graph, precision=offered, cache_dir=cache_dir, rungs=rungs)
            with closing(loaded) as engine:
                for call, given in inputs.items():
                    at_work(f"{call} on {name}", rows)
                    differences.append(_difference(str(call), engine, given, expected[call], name in ON_GPU))
    return differences


def _difference(call: str, engine: EngineBackend, inputs: Arrays, expected: Arrays, on_gpu: bool) -> Difference:
    got = engine.run(inputs)
    errors = [_errors(got[name], want) for name, want in expected.items()]
    rows_equal, row_error = _in_other_batches(engine, inputs, got)
    return Difference(
        call=call,
        engine=engine.name,
        max_abs_error=_largest(errors),
        mean_abs_error=float(np.mean([error.mean() for error in errors])),
        rows_equal=rows_equal,
        row_error=row_error,
        levels=any(want.dtype == np.uint8 for want in expected.values()),
        on_gpu=on_gpu,
    )


def _in_other_batches(engine: EngineBackend, inputs: Arrays, whole: Arrays) -> tuple[bool, float]:
    """Rows alone, in halves, and in reverse order: whether bit-equal, and the largest error."""
    n, equal, errors = len(next(iter(inputs.values()))), True, []
    for part in (slice(0, 1), slice(0, n // 2), slice(None, None, -1)):
        again = engine.run({name: array[part] for name, array in inputs.items()})
        for name, array in whole.items():
            equal &= again[name].tobytes() == np.ascontiguousarray(array[part]).tobytes()
            errors.append(_errors(again[name], array[part]))
    return equal, _largest(errors)


def _errors(got: NDArray[Any], want: NDArray[Any]) -> NDArray[np.float64]:
    errors: NDArray[np.float64] = np.abs(got.astype(np.float64) - want)
    return errors


def _largest(errors: Sequence[NDArray[np.float64]]) -> float:
    """NaN where any is, which no tolerance allows."""
    return float(np.max([error.max() for error in errors]))
