"""Goodput under open-loop Poisson load of mixed N and guidance, against other ways to serve the same student.

Each contender is started alone, loaded at rising rates and ended; rounds repeat that in turn. Goodput at a rate:
right answers a second within the objective. A contender's figure: its goodput at the highest rate of which at
least 99 % came within the objective. LitServe's batch size and timeout are swept first; its best pair counts.
The last line is JSON. Run: python -m tests.benchmarks.goodput BUNDLE [--rounds 2] [--seconds 10] [--tiny]
"""

from __future__ import annotations

import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from engines.open import open_pipeline
from engines.pipeline import Pipeline
from server.encoding import Encoding, encode
from tests.benchmarks.load import Call, Outcome, arrivals, offer
from tests.benchmarks.results import Watch
from tests.benchmarks.rivals import PATH

ROOT = Path(__file__).parents[2]
MODULE = "tests.benchmarks.goodput"
OURS = "/v1/images/generations"
LITSERVE = tuple((batch, wait_ms) for batch in (4, 8, 16) for wait_ms in (0.0, 10.0))
SCREEN_AT = (0.6, 0.8)
LOADS = (0.3, 0.45, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Offered rate over what the raw loop makes."""
OBJECTIVE_OF_LONE = 5.0
"""The objective, in medians of a lone request of the most steps through the bare chain."""
ENOUGH_WITHIN = 0.99

_err = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Contender:
    """How one is started. arguments: after ``python -m``, {port} filled in; ready: a path that answers 200."""

    name: str
    arguments: tuple[str, ...]
    path: str
    ready: str


@dataclass(frozen=True)
class Point:
    """One contender at one rate."""

    contender: str
    load: float
    round: int
    outcome: Outcome


def contenders(bundle: Path, litserve: tuple[int, float], tiny: bool) -> tuple[Contender, ...]:
    serve = ("serve", "--bundle", str(bundle), "--port", "{port}", "--log-level", "error")
    return (
        Contender("halfstep", ("server", *serve), OURS, "/readyz"),
        Contender("halfstep, whole requests batched", ("tests.benchmarks.request_level", *serve), OURS, "/readyz"),
        lit_contender(bundle, *litserve),
        Contender(
            "FastAPI + diffusers",
            ("tests.benchmarks.rivals", "diffusers", "{port}", *(["--tiny"] if tiny else [])),
            PATH,
            "/health",
        ),
    )


def lit_contender(bundle: Path, batch: int, wait_ms: float) -> Contender:
    options = ("--batch", str(batch), "--wait-ms", str(wait_ms))
    arguments = ("tests.benchmarks.rivals", "litserve", str(bundle), "{port}", *options)
    return Contender(f"LitServe, batch {batch}, {wait_ms:g} ms", arguments, PATH, "/health")


@contextmanager
def started(contender: Contender, log: Path) -> Iterator[str]:
    """The base URL of a contender that answers; it is ended afterwards with all its children."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", *(part.format(port=port) for part in contender.arguments)]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
        url = f"http://127.0.0.1:{port}"
        try:
            _await(url + contender.ready, process, log)
            yield url
        finally:
            subprocess.run(["pkill", "-TERM", "-s", str(process.pid)], check=False)
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=False)
            process.wait()


def _await(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(1200):
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"{url} never answered: {log.read_text()[-2000:]}")


def calls(pipeline: Pipeline, path: str, rate: float, seconds: float, seed: int) -> list[Call]:
    """The same wishes for every contender: N from the bundle's students, guidance from its whole range."""
    chosen = random.Random(seed)
    prompts, steps = pipeline.tokenizer.known(), sorted({s.steps for s in pipeline.manifest.students})
    allowed = pipeline.manifest.guidance
    made = []
    for at_s in arrivals(rate, seconds, seed):
        wish: dict[str, Any] = {
            "prompt": chosen.choice(prompts),
            "guidance_scale": round(chosen.uniform(allowed.min, allowed.max), 2),
            "steps": chosen.choice(steps),
            "seed": chosen.randrange(2**32),
        }
        if path == OURS:
            wish["output_format"] = "jpeg"
        made.append(Call(at_s, path, json.dumps(wish).encode()))
    return made


def bare_figures(pipeline: Pipeline) -> tuple[float, float]:
    """(seconds of a lone request of the most steps, images/s of the raw loop over the same mix of N)."""
    prompt, steps = pipeline.tokenizer.known()[0], sorted({s.steps for s in pipeline.manifest.students})
    encoding = Encoding("jpeg", None, "{}")
    lone = []
    for seed in range(9):
        begun = time.perf_counter()
        encode(pipeline.generate([prompt], 2.0, [seed], steps[-1])[0], encoding)
        lone.append(time.perf_counter() - begun)
    begun, images = time.perf_counter(), 0
    assert pipeline.costs is not None
    while images < 200:
        for n in steps:
            batch = pipeline.costs.best_rung(pipeline.student(n).graph, pipeline.max_rows)
            count = max(1, batch)
            for pixels in pipeline.generate([prompt] * count, 2.0, range(count), n):
                encode(pixels, encoding)
            images += count
    return statistics.median(lone), images / (time.perf_counter() - begun)


def sustained(points: Sequence[Point], contender: str) -> float:
    """Goodput at the highest rate kept in every round, its median over the rounds; 0 where none is kept."""
    best = 0.0
    for load in sorted({p.load for p in points if p.contender == contender}):
        here = [p.outcome for p in points if p.contender == contender and p.load == load]
        if min(outcome.within for outcome in here) >= ENOUGH_WITHIN:
            best = max(best, statistics.median(outcome.goodput for outcome in here))
    return best


def table(points: Sequence[Point], objective_s: float) -> Table:
    made = Table(title=f"goodput a second | p99 ms, objective {1000 * objective_s:.0f} ms, by offered / raw")
    made.add_column("contender")
    loads = sorted({p.load for p in points})
    for load in loads:
        made.add_column(f"{load:g}", justify="right")
    for name in dict.fromkeys(p.contender for p in points):
        cells = []
        for load in loads:
            here = [p.outcome for p in points if p.contender == name and p.load == load]
            rate, p99 = (
                statistics.median(getattr(o, f) for o in here) if here else 0 for f in ("goodput", "p99_ms")
            )
            cells.append(f"{rate:.1f} | {p99:.0f}")
        made.add_row(name, *cells)
    return made


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle that every contender serves.", show_default=False)],
    rounds: Annotated[int, typer.Option(min=1, help="Times each contender is started.")] = 2,
    seconds: Annotated[float, typer.Option(min=1, help="Of load at each rate.")] = 10.0,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals and wishes.")] = 0,
    tiny: Annotated[bool, typer.Option("--tiny", help="The bundle is a --tiny one, to try the harness.")] = False,
) -> None:
    """Compare ways to serve one student. The last line is one JSON object."""
    watch = Watch()
    pipeline = open_pipeline(bundle)
    lone_s, raw = bare_figures(pipeline)
    objective_s = OBJECTIVE_OF_LONE * lone_s
    _err.print(f"lone {1000 * lone_s:.0f} ms, objective {1000 * objective_s:.0f} ms, raw loop {raw:.1f} images/s")
    with tempfile.TemporaryDirectory(prefix="bench-goodput-") as folder:
        log = Path(folder) / "log"

        def load(contender: Contender, loads: Sequence[float], number: int) -> list[Point]:
            points = []
            with started(contender, log) as url:
                warm_up = calls(pipeline, contender.path, raw * loads[0], 3.0, seed + 99)
                offer(url, warm_up, objective_s)
                for share in loads:
                    sent = calls(pipeline, contender.path, raw * share, seconds, seed + number)
                    points.append(Point(contender.name, share, number, offer(url, sent, objective_s)))
                    _err.print(f"{contender.name} at {share:g}: {points[-1].outcome}")
            return points

        screened: Mapping[tuple[int, float], list[Point]] = {
            pair: load(lit_contender(bundle, *pair), SCREEN_AT, 0) for pair in LITSERVE
        }
        best = max(screened, key=lambda pair: sum(p.outcome.goodput for p in screened[pair]))
        points: list[Point] = []
        everyone = contenders(bundle, best, tiny)
        for number in range(rounds):
            for k in range(len(everyone)):
                points += load(everyone[(k + number) % len(everyone)], LOADS, number)
    Console(width=160).print(table(points, objective_s))
    figures = {c.name: round(sustained(points, c.name), 2) for c in everyone}
    result = {
        "provenance": watch.provenance(MODULE, seed).model_dump(),
        "bundle": pipeline.manifest.name,
        "engine": pipeline.engine_name,
        "lone_ms": round(1000 * lone_s, 1),
        "objective_ms": round(1000 * objective_s, 1),
        "raw_images_per_s": round(raw, 1),
        "sustained_goodput": figures,
        "litserve_screening": [asdict(p) for pair in screened for p in screened[pair]],
        "points": [asdict(replace(p)) for p in points],
    }
    typer.echo(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
