"""A toy bundle with costs that are easy to add up, and requests of a plan over it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from engines.bench import BenchResult, Throughput
from engines.bundle import Bundle, verify_bundle
from engines.calls import calls
from engines.cost import CostTable
from server.capacity.fleet import Fleet, Outcome
from server.capacity.plan import admission_of
from server.capacity.question import Mix
from server.capacity.traffic import Call, Kind, kinds
from server.capacity.worker import WorkerLimits

LIMITS = WorkerLimits(max_rows=64, encode_threads=2, file_s=0.0)


def costs_of(bundle: Bundle) -> CostTable:
    """ms: a step takes 10, 12 or 16 for 1, 2 or 4 rows; decoding 5, 6 or 8; a condition 1; an image 3."""
    rungs = {"condition": (1, 1, 1), "decode": (5, 6, 8), "encode": (3, 3, 3)}
    return CostTable(
        {
            str(call): dict(zip((1, 2, 4), map(float, rungs.get(call.graph, (10, 12, 16))), strict=True))
            for call in calls(bundle.manifest)
        }
    )


def kind_of(path: Path, mix: Mix | None = None, costs: CostTable | None = None) -> Kind:
    """The one kind of a mix. costs: ``costs_of`` where left out."""
    bundle = verify_bundle(path)
    (kind,) = kinds([(bundle.manifest, costs or costs_of(bundle))], mix or Mix())
    return kind


def call(kind: Kind, at_s: float = 0.0, *, new_prompt: bool = True) -> Call:
    return Call(at_s, kind, new_prompt, kind.request.n)


def run_calls(
    path: Path,
    calls: Iterable[Call],
    chosen: list[Kind],
    workers: int = 1,
    limits: WorkerLimits = LIMITS,
    max_queue_s: float = 1e6,
) -> Outcome:
    """What becomes of calls of these kinds."""
    bundle = verify_bundle(path)
    admission = admission_of([(bundle, chosen[0].prices.table)], chosen, max_queue_s, 1_000_000)
    return Fleet(workers, limits, admission, seed=0).run(calls)


def bench_file(path: Path, folder: Path) -> Path:
    """What a bench of a bundle printed, with ``costs_of`` it."""
    bundle = verify_bundle(path)
    best = Throughput(steps=4, sampler="deterministic", batch=4, images_per_s=1.0)
    result = BenchResult(
        bundle=bundle.manifest.name,
        engine="fake 1 float32",
        machine="a machine",
        python="3.12",
        numpy="2",
        threads=0,
        repeats=1,
        command="python -m engines bench toy",
        ms={graph: dict(rungs) for graph, rungs in costs_of(bundle).ms.items()},
        flop={},
        ceiling_gflop_s=1.0,
        fraction={},
        throughput=(best,),
        generate=best,
        host_memory_mb=1.0,
        device_memory_mb=None,
    )
    file = folder / "bench.txt"
    file.write_text(f"a table\n{result.model_dump_json()}\n", encoding="utf-8")
    return file
