"""The goodput section of docs/benchmarks.md."""

from __future__ import annotations

import math
from collections.abc import Iterator

from tests.benchmarks.page_parts import origin, repeat, short, table
from tests.benchmarks.results import Goodput

WORDS = """## Goodput of a mixed load: {bundle}

Open-loop Poisson load from a process of its own: {tasks} in equal shares, N of {steps} in equal shares,
guidance from the whole range, strength 0.3 to 1. {graphs}. Latency counts from the planned departure. Every
contender takes every task and serves the same weights, all but eager torch on the same engine; an answer is
right when it holds the expected picture, each pixel within 2 levels of what a bare call chain draws. The
objective, {objective:.0f} ms, is five times a lone request of the most steps. A rate is kept when {within:.0f}
% of the requests got their picture within it, in the median of {rounds} rounds; contenders alternate, {seconds:g} s
at each rate, up to one at which most requests are late. *Goodput* is what was within the objective, a second, at
the highest rate kept, the median of the rounds. Rates are given over the {raw:.1f} images/s of a raw loop in
whole batches of like steps. LitServe: {screened} batch size and timeout pairs were swept, the best is shown.
*Whole requests batched*: this server, where nobody joins a batch until it is done.
"""
GRAPHS = {
    True: "One set of weights, so one step graph whose batches mix every N, task and guidance",
    False: "Each N has weights of its own, so only rows of the same N share a step",
}


def goodput_section(result: Goodput) -> str:
    words = WORDS.format(
        bundle=result.bundle,
        tasks=", ".join(task.replace("_", "-") for task in result.tasks),
        steps=", ".join(map(str, result.steps)),
        graphs=GRAPHS[result.one_graph],
        objective=result.objective_ms,
        within=100 * result.enough_within,
        rounds=result.rounds,
        seconds=result.seconds,
        raw=result.raw_images_per_s,
        screened=len({point.contender for point in result.screened}),
    )
    head = ("contender", "goodput a second", "ours over its", "rate kept", "p50 ms there", "p99 ms there")
    where = origin(result.provenance, repeat(result.provenance.command, result.bundle))
    return "\n".join([words, where, table(head, rows(result)), _sums(result)])


def rows(result: Goodput) -> Iterator[tuple[str, ...]]:
    """One line a contender, of the highest rate that it kept."""
    ours = result.sustained(result.contenders[0])
    for name in result.contenders:
        kept, figure = result.kept(name), result.sustained(name)
        rate = f"{kept[0].load:g}" if kept else "none"
        p50 = ", ".join(f"{point.outcome.p50_ms or math.nan:.0f}" for point in kept)
        p99 = ", ".join(f"{point.outcome.p99_ms or math.nan:.0f}" for point in kept)
        ratio = f"{ours / figure:.2f}" if figure else "its is 0"
        yield name, short(figure), ratio, rate, p50, p99


def over_litserve(result: Goodput) -> float:
    """Our goodput over LitServe's; infinite where it kept no rate."""
    ours, its = (result.sustained(result.contenders[k]) for k in (0, 2))
    return ours / its if its else math.inf


def _sums(result: Goodput) -> str:
    """What went wrong over all loads, by contender."""
    lines = []
    for name in result.contenders:
        outcomes = [point.outcome for point in result.points if point.contender == name]
        wrong, failed = sum(o.wrong for o in outcomes), sum(o.failed for o in outcomes)
        lines.append(
            f"{name}: {wrong} wrong pictures, {failed} failed, {sum(o.rejected for o in outcomes)} refused"
        )
    return "Over all rates, missed ones too: " + "; ".join(lines) + ".\n"
