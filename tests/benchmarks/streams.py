"""OpenVINO's threads and streams on one step graph, float32 and int8, and what its model cache saves at a start.

A batch is one request on all threads, or one share of it for each stream, run at once: rows are independent.
Settings alternate inside a run; the last line is JSON.
Run: python -m tests.benchmarks.streams [--batches 2,4,8,16,32] [--rounds 7] [--seed 0] [--tiny]
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import openvino as ov
import psutil
import typer

from engines.backends.openvino import OpenVinoBackend
from engines.bundle import Bundle
from engines.condition import load_tokenizer
from engines.examples import example_inputs
from engines.quantize import quantize_bundle
from tests.benchmarks.random_bundle import TINY_UNET, UNET, RandomOptions, graph_name, make_random_bundle
from tests.benchmarks.results import Compilation, Setting, Streams, Watch

MODULE = "tests.benchmarks.streams"
STEPS = 4
CORES = psutil.cpu_count() or 1
SETTINGS = tuple(dict.fromkeys(((1, 1), (1, CORES), (CORES, CORES))))
"""(streams, threads of all of them together): one thread, the engine's own choice, a stream a core."""


class Arrangement:
    """A step graph compiled for one share of a batch, with a request for each stream."""

    def __init__(self, bundle: Bundle, streams: int, threads: int, batch: int, seed: int) -> None:
        graph = graph_name(STEPS)
        model = ov.Core().read_model(bundle.graph_file(graph))
        rows = example_inputs(bundle.manifest, load_tokenizer(bundle), graph, batch // streams, seed)
        model.reshape({name: list(array.shape) for name, array in rows.items()})
        config = {"NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        compiled: Any = ov.Core().compile_model(model, "CPU", config)
        self._requests = [compiled.create_infer_request() for _ in range(streams)]
        self._rows = rows

    def run(self) -> None:
        for request in self._requests:
            request.start_async(self._rows, share_inputs=True)
        for request in self._requests:
            request.wait()


def measure(bundles: Sequence[Bundle], batches: Sequence[int], rounds: int, seed: int) -> Streams:
    """Every bundle's step graph in every setting at every batch size that its streams can share."""
    watch = Watch()
    settings: list[Setting] = []
    for bundle in bundles:
        for batch in batches:
            settings += _settings(bundle, batch, rounds, seed)
    compilations = tuple(_compilation(bundle, max(batches), seed) for bundle in bundles)
    return Streams(
        provenance=watch.provenance(MODULE, seed),
        rounds=rounds,
        settings=tuple(settings),
        compilations=compilations,
    )


def _settings(bundle: Bundle, batch: int, rounds: int, seed: int) -> list[Setting]:
    able = [setting for setting in SETTINGS if batch % setting[0] == 0]
    arranged = {setting: Arrangement(bundle, *setting, batch, seed) for setting in able}
    times: dict[tuple[int, int], list[float]] = {setting: [] for setting in able}
    for _ in range(rounds):
        for setting, arrangement in arranged.items():
            arrangement.run()
            begun = time.perf_counter()
            for _ in range(STEPS):
                arrangement.run()
            times[setting].append((time.perf_counter() - begun) / STEPS)
    return [
        Setting(
            dtype=_dtype(bundle),
            streams=streams,
            threads=threads,
            batch=batch,
            ms_per_step=round(1e3 * statistics.median(seconds), 3),
        )
        for (streams, threads), seconds in times.items()
    ]


def _compilation(bundle: Bundle, batch: int, seed: int) -> Compilation:
    """The first run of an engine at one batch size, without and with its compiled model in the cache."""
    graph = graph_name(STEPS)
    spec, file = bundle.manifest.graphs[graph], bundle.graph_file(graph)
    rows = example_inputs(bundle.manifest, load_tokenizer(bundle), graph, batch, seed)
    seconds = []
    with tempfile.TemporaryDirectory(prefix="bench-cache-") as cache:
        for _ in range(2):
            begun = time.perf_counter()
            engine = OpenVinoBackend(file, spec, cache_dir=Path(cache))
            engine.run(rows)
            seconds.append(time.perf_counter() - begun)
            engine.close()
    cold, cached = seconds
    return Compilation(dtype=_dtype(bundle), batch=batch, cold_s=round(cold, 3), cached_s=round(cached, 3))


def _dtype(bundle: Bundle) -> str:
    return bundle.manifest.graphs[graph_name(STEPS)].dtype


def main(
    batches: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "2,4,8,16,32",
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds each; the median counts.")] = 7,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and the rows.")] = 0,
    tiny: Annotated[bool, typer.Option("--tiny", help="A toy size, to try the harness.")] = False,
) -> None:
    """Time OpenVINO's thread and stream settings. The last line is one JSON object."""
    options = RandomOptions(seed=seed, steps=(STEPS,), unet=TINY_UNET if tiny else UNET)
    with tempfile.TemporaryDirectory(prefix="bench-streams-") as folder:
        bundle = make_random_bundle(Path(folder) / "random", options)
        int8 = quantize_bundle(bundle, Path(folder) / "int8")
        sizes = [int(part) for part in batches.split(",")]
        typer.echo(measure((bundle, int8), sizes, rounds, seed).model_dump_json())


if __name__ == "__main__":
    typer.run(main)
