"""The goodput section of docs/benchmarks.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator

from tests.benchmarks.page_parts import origin, repeat, short, table
from tests.benchmarks.results import Goodput

HEAD = ("contender", "goodput a second", "ours over its", "rate kept", "p50 ms there", "p99 ms there")
WORDS = """## Goodput of a mixed load: {bundle}

Open-loop Poisson load from a process of its own: {tasks} in equal shares, N of {steps} in equal shares, guidance
from the whole range, strength 0.3 to 1. {graphs}. Latency counts from the planned departure. Every contender
takes every task and serves the same weights, all but eager torch on the same engine; an answer is right when it
holds the expected picture, each pixel within 2 levels of what a bare call chain draws. The objective is
{objective:g} times a lone request of the most steps, and a rate is given over the images/s of a raw loop in whole
batches of like steps; both are measured without a server before each rate, as the machine's speed changes. All
contenders are started in each of {rounds} rounds; at each rate one after the other gets the same requests at the
same times for {seconds:g} s while the others sleep, and is left out of higher ones once most of its requests are
late. The *rate kept* is where the share within the objective, the median of the rounds, falls below {within:.0f}
%, read between two rates in proportion; *goodput* is what is within the objective, a second, there, on the median
raw loop. Brackets: the 5th and 95th percentile of the ratio over rounds drawn anew from those made. LitServe:
{screened} batch size and timeout pairs were swept likewise, the best is shown.
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
        objective=result.objective_of_lone,
        within=100 * result.enough_within,
        rounds=result.rounds,
        seconds=result.seconds,
        screened=len({point.contender for point in result.screened}),
    )
    where = origin(result.provenance, repeat(result.provenance.command, result.bundle))
    shares = table(("% within the objective, at rate", *map(short, _loads(result))), _shares(result))
    return "\n".join([words, where, _paces(result), table(HEAD, rows(result)), shares, _sums(result)])


def rows(result: Goodput) -> Iterator[tuple[str, ...]]:
    """One line a contender; its latencies at the highest rate offered up to the one kept, medians of the rounds."""
    ours = result.contenders[0]
    for name in result.contenders:
        kept = result.rate_kept(name)
        at = [p.outcome for p in result.points if p.contender == name and p.load == _below(result, kept)]
        yield (
            name,
            short(result.sustained(name)),
            _ratio(*result.over(ours, name)) if name != ours else "1",
            f"{kept:.2f}" if kept else "none",
            _middle(of.p50_ms for of in at),
            _middle(of.p99_ms for of in at),
        )


def _paces(result: Goodput) -> str:
    paces = [point.pace for point in result.points]
    lone, raw = [pace.lone_ms for pace in paces], [pace.images_per_s for pace in paces]
    return (
        f"Without a server: a lone request {_middle(lone)} ms ({min(lone):.0f} to {max(lone):.0f}), "
        f"the raw loop {_middle(raw)} images/s ({min(raw):.0f} to {max(raw):.0f}).\n"
    )


def _middle(figures: Iterable[float | None]) -> str:
    known = [figure for figure in figures if figure is not None]
    return f"{statistics.median(known):.0f}" if known else ""


def _ratio(whole: float, low: float, high: float) -> str:
    return f"{whole:.2f} [{low:.2f}, {high:.2f}]" if math.isfinite(whole) else "its is 0"


def _loads(result: Goodput) -> list[float]:
    return sorted({point.load for point in result.points})


def _below(result: Goodput, kept: float) -> float:
    return max((load for load in _loads(result) if load <= kept), default=0.0)


def _shares(result: Goodput) -> Iterator[tuple[str, ...]]:
    """The median of the rounds, and the least."""
    for name in result.contenders:
        shares = result.shares(name, range(result.rounds))
        least = {
            load: min(p.outcome.within for p in result.points if (p.contender, p.load) == (name, load))
            for load in shares
        }
        cells = (
            f"{100 * shares[load]:.1f} ({100 * least[load]:.0f})" if load in shares else ""
            for load in _loads(result)
        )
        yield name, *cells


def over_litserve(result: Goodput) -> float:
    """Our goodput over LitServe's; infinite where it kept no rate."""
    return result.over(result.contenders[0], result.contenders[2])[0]


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
