"""Goodput under open-loop Poisson load of mixed tasks, N, strength and guidance, against other ways to serve.

Every contender serves the same student and every task. All are started at the begin of a round, and at each rate
one after the other gets the same requests at the same times while the others sleep. What the machine makes
without a server is measured before each rate, and gives the rate and the objective, so that a machine whose speed
changes does so for all; a contender is left out of a round's higher rates once it is hopeless. Rounds repeat
that. The rate kept is where the share of requests that got the right picture within the objective, the median of
the rounds, falls below 99 %, read between the rates offered. Ratios are given with the range of rounds drawn anew
from those made. LitServe's batch size and timeout are swept first, in the same way; its best pair counts.
The last line is JSON. Run: python -m tests.benchmarks.goodput BUNDLE [--rounds 5] [--seconds 6]
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from engines.open import open_pipeline
from engines.pipeline import Pipeline
from tests.benchmarks.load import LoadProcess, Pixels, load_process
from tests.benchmarks.page_goodput import HEAD, rows
from tests.benchmarks.results import Goodput, Outcome, Pace, Point, Watch
from tests.benchmarks.servers import Running, Server, litserve_server, servers, started
from tests.benchmarks.together import make_together
from tests.benchmarks.wishes import Wish, answer, draw_calls, draw_pool

MODULE = "tests.benchmarks.goodput"
LITSERVE = tuple((batch, wait_ms) for batch in (4, 8, 16) for wait_ms in (0.0, 10.0))
SCREEN_AT, SCREEN_ROUNDS = (0.5, 0.7), 2
LADDER = (0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Offered rates, over what the raw loop makes."""
HOPELESS = 0.5
"""Share within the objective below which a contender is offered no higher rate in that round."""
OBJECTIVE_OF_LONE = 5.0
"""The objective, in medians of a lone request of the most steps through the bare chain."""
ENOUGH_WITHIN = 0.99
LONE_REPEATS = 9
WARM_UP_AT, WARM_UP_S, WAKE_UP_S, WARM_UP_SEED = 0.3, 2.0, 0.5, 1000
"""Load before a server's first figure, and after each sleep."""

_err = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Bench:
    """Loads one server at a time. pool: wishes and their right pictures; seconds: of load at each rate."""

    pipeline: Pipeline
    process: LoadProcess
    pool: Sequence[tuple[Wish, Pixels]]
    seconds: float
    seed: int
    watch: Watch

    def rounds(self, servers: Sequence[Server], loads: Sequence[float], rounds: int) -> list[Point]:
        """All points of all rounds."""
        return [point for number in range(rounds) for point in self._round(servers, loads, number)]

    def _round(self, servers: Sequence[Server], loads: Sequence[float], number: int) -> list[Point]:
        with tempfile.TemporaryDirectory(prefix="bench-goodput-") as folder, ExitStack() as stack:
            running = []
            for k, server in enumerate(servers):
                running.append(stack.enter_context(started(server, Path(folder) / f"{k}.log", self.watch)))
                self._offer(running[-1], self._pace(), WARM_UP_AT, WARM_UP_S, self.seed + WARM_UP_SEED)

            def at(load: float) -> Callable[[int], Point]:
                pace = self._pace()
                return lambda k: self._point(running[k], pace, load, number)

            return climb(len(servers), loads, number, at)

    def _point(self, running: Running, pace: Pace, load: float, number: int) -> Point:
        self._offer(running, pace, WARM_UP_AT, WAKE_UP_S, self.seed + WARM_UP_SEED)
        outcome = self._offer(running, pace, load, self.seconds, self.seed + number)
        _err.print(f"{running.server.name} at {load:g}: {outcome}")
        return Point(contender=running.server.name, load=load, round=number, pace=pace, outcome=outcome)

    def _offer(self, running: Running, pace: Pace, load: float, seconds: float, seed: int) -> Outcome:
        calls = draw_calls(self.pool, running.server.path, pace.images_per_s * load, seconds, seed)
        with running.awake():
            return self.process.offer(running.url, calls, OBJECTIVE_OF_LONE * pace.lone_ms / 1000)

    def _pace(self) -> Pace:
        return take_pace(self.pipeline, [wish for wish, _ in self.pool])[0]


def climb(
    contenders: int, loads: Sequence[float], number: int, at: Callable[[float], Callable[[int], Point]]
) -> list[Point]:
    """Up the rates, at each the contenders in turn, beginning with another one, until they are hopeless."""
    points: list[Point] = []
    climbing = set(range(contenders))
    for step, load in enumerate(loads):
        measure = at(load)
        for place in range(contenders):
            k = (place + step + number) % contenders
            if k in climbing:
                points.append(measure(k))
                if points[-1].outcome.within < HOPELESS:
                    climbing.discard(k)
        if not climbing:
            break
    return points


def take_pace(pipeline: Pipeline, wishes: Sequence[Wish]) -> tuple[Pace, list[Pixels]]:
    """Time a lone request of the most steps, and all in whole batches as they come, files included; the pictures.

    wishes: by steps, so that a batch is of like steps.
    """
    assert pipeline.costs is not None
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
    pace = Pace(lone_ms=round(1000 * statistics.median(lone), 1), images_per_s=round(rate, 1))
    _err.print(f"without a server: {pace}")
    return pace, pictures


def measure(pipeline: Pipeline, bundle: Path, rounds: int, seconds: float, seed: int) -> Goodput:
    """Sweep LitServe, then every server in every round."""
    watch = Watch()
    wishes = sorted(draw_pool(pipeline, seed), key=lambda wish: wish.steps)
    pool = tuple(zip(wishes, take_pace(pipeline, wishes)[1], strict=True))
    with load_process() as process:
        bench = Bench(pipeline, process, pool, seconds, seed, watch)
        rivals = {litserve_server(bundle, *pair): pair for pair in LITSERVE}
        screened = bench.rounds(tuple(rivals), SCREEN_AT, SCREEN_ROUNDS)
        best = max(rivals, key=lambda rival: sum(p.outcome.goodput for p in screened if p.contender == rival.name))
        everyone = servers(bundle, rivals[best])
        points = bench.rounds(everyone, LADDER, rounds)
    return Goodput(
        provenance=watch.provenance(MODULE, seed),
        bundle=pipeline.manifest.name,
        engine=pipeline.engine_name,
        steps=tuple(sorted({wish.steps for wish in wishes})),
        one_graph=len({student.graph for student in pipeline.manifest.students}) == 1,
        tasks=tuple(sorted({wish.task for wish in wishes})),
        rounds=rounds,
        seconds=seconds,
        objective_of_lone=OBJECTIVE_OF_LONE,
        enough_within=ENOUGH_WITHIN,
        contenders=tuple(server.name for server in everyone),
        screened=tuple(screened),
        points=tuple(points),
    )


def table(result: Goodput) -> Table:
    """One line a contender."""
    made = Table(title=f"lone request {result.lone_ms:.0f} ms; raw loop {result.raw_images_per_s:.1f} images/s")
    for column in HEAD:
        made.add_column(column)
    for row in rows(result):
        made.add_row(*row)
    return made


def main(
    bundle: Annotated[Path, typer.Argument(help="Random bundle that every contender serves.", show_default=False)],
    rounds: Annotated[int, typer.Option(min=1, help="Times each contender is started.")] = 5,
    seconds: Annotated[float, typer.Option(min=1, help="Of load at each rate.")] = 6.0,
    seed: Annotated[int, typer.Option(min=0, help="Of arrivals and wishes.")] = 0,
) -> None:
    """Compare ways to serve one student. The last line is one JSON object."""
    result = measure(open_pipeline(bundle), bundle, rounds, seconds, seed)
    Console(width=160).print(table(result))
    typer.echo(result.model_dump_json())


if __name__ == "__main__":
    typer.run(main)
