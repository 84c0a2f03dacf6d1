"""``python -m tests.load``: servers under more load, and other load, than is good for them; exit 1 for a miss."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tests.load.fairness import fairness
from tests.load.overload import overload
from tests.load.planned import planned
from tests.load.rolling import Restarts, rolling
from tests.load.scale import scale
from tests.support.toy_bundle import make_toy_bundle

OVERLOAD_S, FAIRNESS_S, SCALE_S, PLANNED_S = 600.0, 60.0, 20.0, 60.0
ROLLING = Restarts(apis=2, workers=3, jobs=1200, seconds=60.0, rounds=2)

Measure = Callable[[Path, Path], bool]
"""(bundle, log) → whether the targets were met."""

app = typer.Typer(add_completion=False)


class Store(StrEnum):
    MEMORY = "memory"
    REDIS = "redis"


StoreOption = Annotated[Store, typer.Option(help="Memory: one process; redis: an API, a worker and a Redis.")]


@app.command("overload")
def overload_command(
    store: StoreOption = Store.MEMORY,
    seconds: Annotated[float, typer.Option(min=5, help="Of ten times the capacity.")] = OVERLOAD_S,
) -> None:
    """Ten times what the server can make."""
    _run([partial(overload, store, seconds)])


@app.command("fairness")
def fairness_command(
    store: StoreOption = Store.MEMORY,
    seconds: Annotated[float, typer.Option(min=5, help="Of each of the two loads.")] = FAIRNESS_S,
) -> None:
    """One tenant at a hundred times another's load."""
    _run([partial(fairness, store, seconds)])


@app.command("rolling")
def rolling_command() -> None:
    """Every process ended by SIGTERM and started again, twice."""
    _run([partial(rolling, ROLLING)])


@app.command("scale")
def scale_command(
    seconds: Annotated[float, typer.Option(min=5, help="Of full load for each.")] = SCALE_S,
) -> None:
    """One, two, three workers."""
    _run([partial(scale, seconds)])


@app.command("planned")
def planned_command(
    seconds: Annotated[float, typer.Option(min=5, help="Of each of two loads.")] = PLANNED_S,
) -> None:
    """Two workers, next to what the capacity planner says of them."""
    _run([partial(planned, seconds)])


@app.command("all")
def everything() -> None:
    """All of the above, on both stores where there are two: some 27 minutes."""
    measures: list[Measure] = []
    for store in Store:
        measures += [partial(overload, store, OVERLOAD_S), partial(fairness, store, FAIRNESS_S)]
    _run([*measures, partial(rolling, ROLLING), partial(scale, SCALE_S), partial(planned, PLANNED_S)])


def _run(measures: Sequence[Measure]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bundle, log = make_toy_bundle(Path(folder) / "toy").path, Path(folder) / "log"
        met = [measure(bundle, log) for measure in measures]
        if not all(met):
            Console(stderr=True).print(log.read_text()[-20_000:], markup=False, highlight=False)
            raise typer.Exit(1)


if __name__ == "__main__":
    app()
