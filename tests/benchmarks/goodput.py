"""Goodput under open-loop Poisson load of mixed tasks, N, strength and guidance, against other ways to serve.

Every contender serves the same student and every task; each is started alone, goes up the same rates until it is
hopeless and is ended; rounds repeat that in turn. A rate is kept where, in the median of the rounds, at least 99 %
of the requests got the right picture within the objective: a hiccup of the machine in one round decides nothing.
Goodput: right pictures within the objective, a second, at the highest rate kept, the median of the rounds.
LitServe's batch size and timeout are swept first; its best pair counts.
The last line is JSON. Run: python -m tests.benchmarks.goodput BUNDLE [--rounds 3] [--seconds 8]
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from engines.open import open_pipeline
from engines.pipeline import Pipeline
from tests.benchmarks.load import LoadProcess, Pixels, load_process
from tests.benchmarks.page_goodput import rows
from tests.benchmarks.results import Goodput, Outcome, Point, Watch
from tests.benchmarks.servers import Server, litserve_server, servers, started
from tests.benchmarks.together import make_together
from tests.benchmarks.wishes import Wish, answer, draw_calls, draw_pool

MODULE = "tests.benchmarks.goodput"
LITSERVE = tuple((batch, wait_ms) for batch in (4, 8, 16) for wait_ms in (0.0, 10.0))
SCREEN_AT = (0.8,)
LADDER = (0.075, 0.15, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Offered rates, over what the raw loop makes."""
HOPELESS = 0.5
"""Share within the objective below which no higher rate is tried."""
OBJECTIVE_OF_LONE = 5.0
"""The objective, in medians of a lone request of the most steps through the bare chain."""
ENOUGH_WITHIN = 0.99
LONE_REPEATS = 9
WARM_UP_AT, WARM_UP_S, WARM_UP_SEED = 0.3, 2.0, 1000

_err = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Bare:
    """The pipeline without a server. pool: wishes and their right pictures."""

    lone_s: float
    images_per_s: float
    pool: tuple[tuple[Wish, Pixels], ...]


@dataclass(frozen=True)
class Bench:
    """Loads one server at a time. rate: images/s of the raw loop; seconds: of load at each rate."""

    process: LoadProcess
    pool: Sequence[tuple[Wish, Pixels]]
    rate: float
    objective_s: float
    seconds: float
    seed: int
    watch: Watch

    def climb(self, server: Server, number: int) -> list[Point]:
        """All loads of one round of a server."""
        with self._started(server) as offer:
            return climb(lambda load: self._point(server, load, number, offer(load, self.seed + number)))

    def screen(self, server: Server) -> list[Point]:
        """A few fixed loads."""
        with self._started(server) as offer:
            return [self._point(server, load, 0, offer(load, self.seed)) for load in SCREEN_AT]

    @contextmanager
    def _started(self, server: Server) -> Iterator[Callable[[float, int], Outcome]]:
        with (
            tempfile.TemporaryDirectory(prefix="bench-goodput-") as folder,
            started(server, Path(folder) / "log", self.watch) as url,
        ):

            def offer(load: float, seed: int, seconds: float = self.seconds) -> Outcome:
                calls = draw_calls(self.pool, server.path, self.rate * load, seconds, seed)
                return self.process.offer(url, calls, self.objective_s)

            offer(WARM_UP_AT, self.seed + WARM_UP_SEED, WARM_UP_S)
            yield offer

    def _point(self, server: Server, load: float, number: int, outcome: Outcome) -> Point:
        _err.print(f"{server.name} at {load:g}: {outcome}")
        return Point(contender=server.name, load=load, round=number, outcome=outcome)


def climb(measure: Callable[[float], Point]) -> list[Point]:
    """Rates up the ladder until one is hopeless."""
    points: list[Point] = []
    for load in LADDER:
        points.append(measure(load))
        if points[-1].outcome.within < HOPELESS:
            break
    return points


def bare(pipeline: Pipeline, seed: int) -> Bare:
    """Time a lone request of the most steps, and the pool in whole batches of like steps, files included."""
    assert pipeline.costs is not None
    wishes = sorted(draw_pool(pipeline, seed), key=lambda wish: wish.steps)
    longest = [wish for wish in wishes if wish.task == "text_to_image"][-1]
    lone = []
    for _ in range(LONE_REPEATS):
        begun = time.perf_counter()
        answer(make_together(pipeline, [longest])[0])
        lone.append(time.perf_counter() - begun)
    batch = pipeline.costs.best_rung(pipeline.student(None).graph, pipeline.max_rows)
    begun, pictures = time.perf_counter(), []
    for start in range(0, len(wishes), batch):
        pictures += make_together(pipeline, wishes[start : start + batch])
        for picture in pictures[start:]:
            answer(picture)
    rate = len(wishes) / (time.perf_counter() - begun)
    return Bare(statistics.median(lone), rate, tuple(zip(wishes, pictures, strict=True)))


def measure(pipeline: Pipeline, bundle: Path, rounds: int, seconds: float, seed: int) -> Goodput:
    """Sweep LitServe, then every server in every round, each round beginning with another one."""
    watch, alone = Watch(), bare(pipeline, seed)
    objective_s = OBJECTIVE_OF_LONE * alone.lone_s
    _err.print(f"objective {1000 * objective_s:.0f} ms, raw loop {alone.images_per_s:.1f} images/s")
    with load_process() as process:
        bench = Bench(process, alone.pool, alone.images_per_s, objective_s, seconds, seed, watch)
        screened = {pair: bench.screen(litserve_server(bundle, *pair)) for pair in LITSERVE}
        best = max(screened, key=lambda pair: sum(point.outcome.goodput for point in screened[pair]))
        everyone = servers(bundle, best)
        points: list[Point] = []
        for number, k in itertools.product(range(rounds), range(len(everyone))):
            points += bench.climb(everyone[(k + number) % len(everyone)], number)
    wishes = [wish for wish, _ in alone.pool]
    return Goodput(
        provenance=watch.provenance(MODULE, seed),
        bundle=pipeline.manifest.name,
        engine=pipeline.engine_name,
        steps=tuple(sorted({wish.steps for wish in wishes})),
        one_graph=len({student.graph for student in pipeline.manifest.students}) == 1,
        tasks=tuple(sorted({wish.task for wish in wishes})),
        rounds=rounds,
        seconds=seconds,
        lone_ms=round(1000 * alone.lone_s, 1),
        objective_ms=round(1000 * objective_s, 1),
        enough_within=ENOUGH_WITHIN,
        raw_images_per_s=round(alone.images_per_s, 1),
        contenders=tuple(server.name for server in everyone),
        screened=tuple(point for points in screened.values() for point in points),
        points=tuple(points),
    )


def table(result: Goodput) -> Table:
    """One line a contender."""
    made = Table(title=f"objective {result.objective_ms:.0f} ms; raw loop {result.raw_images_per_s:.1f} images/s")
    for column in ("contender", "goodput a second", "ours over its", "rate kept, of raw", "p50 ms", "p99 ms"):
        made.add_column(column)
    for row in rows(result):
        made.add_row(*row)
    return made


def main(
    bundle: Annotated[Path, typer.Argument(help="Random bundle that every contender serves.", show_default=False)],
    rounds: Annotated[int, typer.Option(min=1, help="Times each contender is started.")] = 3,
    seconds: Annotated[float, typer.Option(min=1, help="Of load at each rate.")] = 8.0,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals and wishes.")] = 0,
) -> None:
    """Compare ways to serve one student. The last line is one JSON object."""
    result = measure(open_pipeline(bundle), bundle, rounds, seconds, seed)
    Console(width=160).print(table(result))
    typer.echo(result.model_dump_json())


if __name__ == "__main__":
    typer.run(main)
