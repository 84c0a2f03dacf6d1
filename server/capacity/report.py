"""A plan, and how it is printed: a table of forecasts, the answer, and what it leaves out."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from server.capacity.plan import Forecast
from server.request import Frozen

LEFT_OUT = (
    "Left out: the network, API processes (one parses and answers some hundred requests a second), the job store, "
    "previews, webhooks, a safety check, failures and restarts, tenants and priorities. On processors, whatever "
    "else runs there takes time from the engine. Keep a worker more than this, to survive the loss of one."
)


class PlannedModel(Frozen):
    """engine: as costs were measured on it; costs: where they come from; rungs: batch sizes of its calls."""

    engine: str
    costs: str
    rungs: tuple[int, ...]


class Plan(Frozen):
    """A question and its answer. workers: the least number that keeps p99_s, None where none that was tried does.

    tasks, steps, sizes, images: shares as asked for, None for the models' default; file_ms: of an image, on one of
    encode_threads threads.
    """

    command: str
    models: dict[str, PlannedModel]
    rate: float
    images_per_s: float
    p99_s: float
    requests: int
    seed: int
    tasks: dict[str, float]
    steps: dict[str, float] | None
    sizes: dict[str, float] | None
    images: dict[str, float]
    strength: float | None
    new_prompts: float
    file_ms: float
    max_rows: int
    max_queue_s: float
    max_queued_rows: int
    encode_threads: int
    least_workers: int
    workers: int | None
    forecasts: tuple[Forecast, ...]


def print_plan(plan: Plan, out: Console) -> None:
    """For people; the plan itself is one line of JSON."""
    out.print(_table(plan))
    out.print(_answer(plan), markup=False)
    out.print(LEFT_OUT, markup=False)


def _table(plan: Plan) -> Table:
    engines = "; ".join(f"{name} on {model.engine}" for name, model in plan.models.items())
    load = f"{plan.rate:g} requests/s of {plan.images_per_s / plan.rate:.3g} images, {plan.requests:,} drawn"
    table = Table(title=f"{engines}\n{load}, seed {plan.seed}")
    for heading in ("workers", "p50 ms", "p99 ms", "refused", "engines busy", "rows a step", "kept"):
        table.add_column(heading, justify="right")
    for made in plan.forecasts:
        verdict = "yes" if made.kept else "no"
        figures = (_ms(made.p50_s), _ms(made.p99_s), f"{made.refused:.1%}", f"{made.busy:.0%}", f"{made.rows:.1f}")
        table.add_row(str(made.workers), *figures, verdict)
    return table


def _answer(plan: Plan) -> str:
    if plan.workers is not None:
        word = "worker keeps" if plan.workers == 1 else "workers keep"
        return f"{plan.workers} {word} a p99 of {plan.p99_s:g} s."
    answer = f"None of these keeps a p99 of {plan.p99_s:g} s."
    if any(made.refused > 0 and made.workers >= plan.least_workers for made in plan.forecasts):
        answer += f" Requests are refused beyond max_queue_s ({plan.max_queue_s:g} s of work for each worker)."
    return answer


def _ms(seconds: float | None) -> str:
    return "refused" if seconds is None else f"{1000 * seconds:.0f}"
