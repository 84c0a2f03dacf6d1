"""The ``plan`` command: how many workers an arrival rate needs to keep a p99."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar, get_args

import typer
from rich.console import Console

from engines.errors import HalfstepError
from server import flags
from server.capacity.question import Mix, PlanError, PlannedTask, Question
from server.request import MAX_IMAGES
from server.settings import Settings

if TYPE_CHECKING:
    from server.capacity.plan import Forecast

ValueT = TypeVar("ValueT")

_out = Console(highlight=False)
_err = Console(stderr=True, highlight=False, soft_wrap=True)

Rate = Annotated[float, typer.Option("--rate", help="Requests a second, at Poisson times.", show_default=False)]
P99 = Annotated[
    float, typer.Option("--p99", help="Seconds in which 99 % of the requests have their files.", show_default=False)
]
Tasks = Annotated[
    str,
    typer.Option("--task", help="Shares of text_to_image, edit, inpaint, invert, as text_to_image=8,edit=2."),
]
Steps = Annotated[
    str, typer.Option("--steps", help="Shares of step counts, as 4=3,8=1.", show_default="each model's default")
]
Sizes = Annotated[
    str, typer.Option("--size", help="Shares of sizes, as 512x512=3,768x512=1.", show_default="each model's first")
]
Images = Annotated[str, typer.Option("-n", help="Shares of images a request, as 1=9,4=1.")]
Strength = Annotated[
    float | None,
    typer.Option("--strength", help="Of edits and inpaintings, above 0 to 1.", show_default="0.75 and 1"),
]
NewPrompts = Annotated[
    float, typer.Option("--new-prompts", min=0, max=1, help="Part of requests whose prompt no worker remembers.")
]
CostFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--cost", help="What `python -m engines bench` printed where workers run.", show_default="of this machine"
    ),
]
FileMs = Annotated[
    float | None,
    typer.Option("--file-ms", min=0, help="Milliseconds to write one file.", show_default="measured here"),
]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, max=1000, help="Forecast this many alone, instead of searching.")
]
Requests = Annotated[int, typer.Option("--requests", min=100, help="Requests to draw for each number of workers.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of arrivals and of what they ask for.")]


def plan(
    rate: Rate,
    p99: P99,
    bundle: flags.Bundles = None,
    cost: CostFiles = None,
    task: Tasks = "text_to_image",
    steps: Steps = "",
    size: Sizes = "",
    n: Images = "1",
    strength: Strength = None,
    new_prompts: NewPrompts = 1.0,
    file_ms: FileMs = None,
    workers: Workers = None,
    requests: Requests = 100_000,
    seed: Seed = 0,
    max_queue_s: flags.MaxQueue = None,
    backend: flags.Backend = None,
    precision: flags.Precision = None,
    threads: flags.Threads = None,
    rungs: flags.Rungs = None,
    cache_dir: flags.CacheDir = None,
) -> None:
    """How many workers this load needs: the server's own batching on a virtual clock. The last line is JSON.

    Several bundles share the requests evenly. Other settings that bear on it (max_rows, max_queued_rows,
    encode_threads) are taken from the environment, as a worker takes them.
    """
    try:
        settings = flags.read_settings(
            bundles=bundle or None,
            cache_dir=cache_dir,
            max_queue_s=max_queue_s,
            backend=backend,
            precision=precision,
            threads=threads,
            rungs=rungs,
        )
        mix = Mix(
            tasks=_shares("--task", task, _task),
            steps=_shares("--steps", steps, _count) if steps else None,
            sizes=_shares("--size", size, _size) if size else None,
            images=_shares("-n", n, _images),
            strength=None if strength is None else _within("--strength", strength, 1.0),
            new_prompts=new_prompts,
        )
        question = Question(
            rate=_within("--rate", rate),
            p99_s=_within("--p99", p99),
            mix=mix,
            cost_files=tuple(cost or ()),
            file_ms=file_ms,
            workers=workers,
            requests=requests,
            seed=seed,
        )
        _answer(question, settings)
    except HalfstepError as error:
        _err.print(f"Error: {error}", markup=False)
        raise typer.Exit(1) from None


def _answer(question: Question, settings: Settings) -> None:
    """Imports late, so that --help and wrong values answer at once."""
    from server.capacity.answer import answer  # noqa: PLC0415
    from server.capacity.report import print_plan  # noqa: PLC0415

    with _err.status("Reading costs") as status:

        def told(forecast: Forecast) -> None:
            status.update(f"{forecast.workers} workers: {'enough' if forecast.kept else 'too few'}")

        made = answer(question, settings, f"python -m server {' '.join(sys.argv[1:])}", told)
    print_plan(made, _out)
    typer.echo(made.model_dump_json())


def _shares(name: str, text: str, parse: Callable[[str], ValueT | None]) -> dict[ValueT, float]:
    """``4=3,8=1`` → {4: 3, 8: 1}; a value without a share has 1. Raises: PlanError."""
    shares: dict[ValueT, float] = {}
    for part in text.split(","):
        word, _, share = part.strip().partition("=")
        value = parse(word.strip())
        try:
            weight = float(share or 1)
        except ValueError:
            weight = math.nan
        if value is None or not 0 < weight < math.inf or value in shares:
            raise PlanError(f"{name} {text!r} is no list of different values and shares; {_EXAMPLES[name]}.")
        shares[value] = weight
    return shares


_EXAMPLES = {
    "--task": f"write it like text_to_image=8,edit=2, of {', '.join(get_args(PlannedTask))}",
    "--steps": "write it like 4=3,8=1",
    "--size": "write it like 512x512=3,768x512=1",
    "-n": f"write it like 1=9,4=1, of 1 to {MAX_IMAGES}",
}


def _task(word: str) -> PlannedTask | None:
    return next((task for task in get_args(PlannedTask) if task == word), None)


def _count(word: str) -> int | None:
    return int(word) if word.isascii() and word.isdigit() and int(word) > 0 else None


def _size(word: str) -> str | None:
    width, _, height = word.partition("x")
    return word if _count(width) and _count(height) else None


def _images(word: str) -> int | None:
    count = _count(word)
    return count if count is not None and count <= MAX_IMAGES else None


def _within(name: str, value: float, most: float = math.inf) -> float:
    """Raises: PlanError."""
    if 0 < value <= most and math.isfinite(value):
        return value
    raise PlanError(f"{name} must be above 0" + (f" and at most {most:g}." if math.isfinite(most) else "."))
