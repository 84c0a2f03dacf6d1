"""What HTTP, jobs and batching cost over a bare call chain: latency alone, and images a second when full.

Contenders alternate inside one run, on one bundle; the last line is JSON.
Run: python -m tests.benchmarks.http_overhead [BUNDLE] [--rounds 7]
"""

from __future__ import annotations

import asyncio
import base64
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import httpx
import psutil
import typer

from engines.machine import cores
from engines.open import open_pipeline
from engines.pipeline import Pipeline
from server.encoding import Encoding, encode
from tests.benchmarks.results import Watch
from tests.support.serving import ServerProcess, serving
from tests.support.toy_bundle import ToyOptions, make_toy_bundle

ALONE = 20
CONCURRENT = 64
SEED = 1
URL = "/v1/images/generations"
ENCODING = Encoding("png", None, "{}", "")


def bare_chain(pipeline: Pipeline, prompt: str) -> str:
    """One image without a server: condition, steps, decode, encode, base64."""
    pixels = pipeline.generate([prompt], pipeline.manifest.guidance.default, [SEED])[0]
    return base64.b64encode(encode(pixels, ENCODING)).decode()


def raw_loop(pipeline: Pipeline, prompt: str) -> float:
    """Images a second of whole batches, files included, at the best batch size for the default student."""
    graph = pipeline.student(None).graph
    assert pipeline.costs is not None
    batch = pipeline.costs.best_rung(graph, pipeline.max_rows)
    begun, images = time.perf_counter(), 0
    while images < CONCURRENT * 4:
        made = pipeline.generate([prompt] * batch, pipeline.manifest.guidance.default, range(batch))
        for pixels in made:
            encode(pixels, ENCODING)
        images += batch
    return images / (time.perf_counter() - begun)


async def through_http(url: str, body: dict[str, object]) -> float:
    """Images a second of CONCURRENT clients, each sending its next request when it has its answer."""
    limits = httpx.Limits(max_connections=CONCURRENT)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:

        async def one_client() -> None:
            for _ in range(4):
                (await client.post(URL, json=body)).raise_for_status()

        begun = time.perf_counter()
        await asyncio.gather(*(one_client() for _ in range(CONCURRENT)))
        return CONCURRENT * 4 / (time.perf_counter() - begun)


def without_client(rate: float, client_s: float) -> float:
    """Images a second had the load client run elsewhere: on full cores its CPU seconds are wall time lost."""
    images = CONCURRENT * 4
    return images / (images / rate - client_s / cores())


def server_seconds(server: ServerProcess) -> float:
    times = psutil.Process(server.process.pid).cpu_times()
    return times.user + times.system


def measure(pipeline: Pipeline, server: ServerProcess, rounds: int) -> dict[str, object]:
    prompt = pipeline.tokenizer.known()[0]
    body: dict[str, object] = {"prompt": prompt, "seed": SEED}
    bare_ms, http_ms, client_ms, raw_rate, http_rate, apart_rate, cpu_ratio = [], [], [], [], [], [], []
    with httpx.Client(base_url=server.url, timeout=120) as client:
        for _ in range(rounds):
            for _ in range(ALONE):
                begun = time.perf_counter()
                bare_chain(pipeline, prompt)
                middle, own = time.perf_counter(), time.thread_time()
                client.post(URL, json=body).raise_for_status()
                bare_ms.append(1000 * (middle - begun))
                http_ms.append(1000 * (time.perf_counter() - middle))
                client_ms.append(1000 * (time.thread_time() - own))
            own = time.process_time()
            raw_rate.append(raw_loop(pipeline, prompt))
            own = time.process_time() - own
            theirs, clients = server_seconds(server), time.process_time()
            http_rate.append(asyncio.run(through_http(server.url, body)))
            apart_rate.append(without_client(http_rate[-1], time.process_time() - clients))
            cpu_ratio.append(own / (server_seconds(server) - theirs))
    apart_ms = [whole - own for whole, own in zip(http_ms, client_ms, strict=True)]
    overhead_ms = statistics.median(a - b for a, b in zip(http_ms, bare_ms, strict=True))
    return {
        "bare_p50_ms": round(statistics.median(bare_ms), 2),
        "http_p50_ms": round(statistics.median(http_ms), 2),
        "http_apart_p50_ms": round(statistics.median(apart_ms), 2),
        "overhead_p50_ms": round(overhead_ms, 2),
        "raw_images_per_s": round(statistics.median(raw_rate), 1),
        "http_images_per_s": round(statistics.median(http_rate), 1),
        "http_over_raw": round(statistics.median(h / r for h, r in zip(http_rate, raw_rate, strict=True)), 3),
        "http_over_raw_apart": round(
            statistics.median(h / r for h, r in zip(apart_rate, raw_rate, strict=True)), 3
        ),
        "raw_cpu_over_server_cpu": round(statistics.median(cpu_ratio), 3),
        "load_average": [round(x, 1) for x in psutil.getloadavg()],
    }


def main(bundle: Annotated[Path | None, typer.Argument()] = None, rounds: int = 7) -> None:
    """bundle: a folder, or none for a toy whose step takes some 10 ms at batch 1."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        path = bundle or make_toy_bundle(Path(folder) / "toy", ToyOptions(steps=(4,), channels=96, depth=24)).path
        pipeline = open_pipeline(path)
        with serving([path], log=Path(folder) / "log") as server:
            result = measure(pipeline, server, rounds)
        origin = watch.provenance("tests.benchmarks.http_overhead", SEED).model_dump()
        about = {"bundle": pipeline.manifest.name, "engine": pipeline.engine_name, "rounds": rounds}
        print(json.dumps({"provenance": origin, **about, **result}))  # noqa: T201


if __name__ == "__main__":
    typer.run(main)
