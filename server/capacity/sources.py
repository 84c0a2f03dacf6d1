"""Where the costs of a plan come from: a file that a bench printed, this machine's cache, or a measurement."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from engines.backends.load import engine_key
from engines.bench import BenchResult
from engines.bundle import Bundle, verify_bundle
from engines.calls import calls
from engines.cost import CostTable, climb
from engines.open import kept_costs, open_pipeline
from server.capacity.question import PlanError
from server.capacity.traffic import Kind
from server.encoding import encode, encoding_of
from server.loading import trusted, usable_cache
from server.settings import Settings

FILE_REPEATS = 5


@dataclass(frozen=True)
class Costed:
    """A model and what it costs. engine: on which; source: in words."""

    bundle: Bundle
    costs: CostTable
    engine: str
    source: str


def costed(settings: Settings, files: Sequence[Path]) -> list[Costed]:
    """Every bundle of the settings with the costs of its file; without any file, those of this machine.

    Raises: PlanError, BundleError, BackendError.
    """
    results = [(file, _read(file)) for file in files]
    bundles = [verify_bundle(trusted(path, settings)) for path in settings.bundles]
    if results:
        return [_of_file(bundle, results, settings.rungs) for bundle in bundles]
    return [_of_this_machine(bundle, settings) for bundle in bundles]


def file_ms(kinds: Sequence[Kind]) -> float:
    """Milliseconds in which this machine writes one file of the largest size, of noise: PNG's worst case."""
    request = max((kind.request for kind in kinds), key=lambda request: request.width * request.height)
    pixels = np.random.default_rng(0).integers(0, 256, (request.height, request.width, 3), dtype=np.uint8)
    times = []
    for _ in range(FILE_REPEATS):
        begun = time.perf_counter()
        encode(pixels, encoding_of(request, request.seed, ""))
        times.append(time.perf_counter() - begun)
    return 1000 * statistics.median(times)


def _read(file: Path) -> BenchResult:
    try:
        lines = file.read_text(encoding="utf-8").strip().splitlines()
        return BenchResult.model_validate_json(lines[-1] if lines else "")
    except OSError as error:
        raise PlanError(f"{file} cannot be read: {error.strerror}.") from None
    except (ValidationError, ValueError):
        raise PlanError(f"The last line of {file} is not what python -m engines bench prints.") from None


def _of_file(bundle: Bundle, results: Sequence[tuple[Path, BenchResult]], rungs: Sequence[int]) -> Costed:
    """At the rungs that a worker with the same settings would run."""
    name = bundle.manifest.name
    for file, result in results:
        if result.bundle == name:
            missing = [str(call) for call in calls(bundle.manifest) if str(call) not in result.ms]
            if missing:
                raise PlanError(f"{file} has no costs of the graph {missing[0]}; bench the bundle again.")
            return Costed(bundle, _at(rungs, result, file), result.engine, f"{file}, on {result.machine}")
    known = ", ".join(result.bundle for _, result in results)
    raise PlanError(f"No --cost file is of the model {name}; there is {known}.")


def _at(rungs: Sequence[int], result: BenchResult, file: Path) -> CostTable:
    try:
        return climb(rungs, lambda rung: {call: ms[rung] for call, ms in result.ms.items()})
    except KeyError as missing:
        raise PlanError(
            f"{file} has no costs of {missing} rows: bench with --rungs {','.join(map(str, rungs))}, or give this "
            "plan and the workers the --rungs of the bench."
        ) from None


def _of_this_machine(bundle: Bundle, settings: Settings) -> Costed:
    """Kept ones, else measured now, as a worker does when it starts."""
    backend, precision, threads = settings.backend, settings.precision, settings.threads
    cache_dir = usable_cache(settings.cache_dir)
    costs = kept_costs(bundle, backend, precision, threads, cache_dir, settings.rungs)
    source = f"kept in {cache_dir}"
    if costs is None:
        pipeline = open_pipeline(
            bundle.path,
            backend,
            precision=precision,
            threads=threads,
            cache_dir=cache_dir,
            rungs=settings.rungs,
        )
        costs, source = pipeline.costs, "measured now"
        pipeline.close()
    assert costs is not None  # of a warm pipeline
    keys = [engine_key(bundle, s.graph, backend, precision, threads) for s in bundle.manifest.students]
    return Costed(bundle, costs, ", ".join(dict.fromkeys(key.engine for key in keys)), source)
