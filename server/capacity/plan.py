"""How many workers it takes: forecasts for more and more of them, until the objective is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from engines.bundle import Bundle
from engines.cost import CostTable
from server.admission import Admission
from server.capacity.fleet import Fleet, Outcome
from server.capacity.question import PlanError
from server.capacity.traffic import Call, Kind, poisson
from server.capacity.worker import WorkerLimits
from server.catalogue import Catalogue, Model
from server.costs import CostBook, Offer
from server.request import DenoiseRequest, Frozen

OBJECTIVE = 0.99
"""The part of all requests that has to be answered in time; one that is refused is not."""

MAX_WORKERS = 1000

FEWER, MORE = 2, 1
"""Forecasts around the answer, to compare with."""

FIRST_LOOK, LEAST_REQUESTS = 10, 1000
"""A search first tries the load's first tenth, but no fewer requests."""


class Forecast(Frozen):
    """What a number of workers makes of the load.

    p50_s, p99_s: seconds, None where so many are refused; refused: part of all requests; busy: part of the time
    that engines work; rows: a step, on average.
    """

    workers: int
    kept: bool
    p50_s: float | None
    p99_s: float | None
    refused: float
    busy: float
    rows: float


@dataclass(frozen=True)
class Load:
    """rate: requests a second; requests: how many are drawn; new_prompts: part of them; seed: of all draws."""

    kinds: Sequence[Kind]
    rate: float
    requests: int
    new_prompts: float
    seed: int

    @property
    def least_workers(self) -> int:
        """Fewer than so many cannot keep up, however well they batch."""
        return max(1, math.ceil(self.rate * sum(kind.share * kind.least_s for kind in self.kinds)))

    @property
    def images_per_s(self) -> float:
        return self.rate * sum(kind.share * kind.request.n for kind in self.kinds)


class Planner:
    """One load on fleets of different size. p99_s: the objective."""

    def __init__(self, load: Load, p99_s: float, limits: WorkerLimits, admission: Admission) -> None:
        self._load = load
        self._p99_s = p99_s
        self._limits = limits
        self._admission = admission

    @property
    def kinds(self) -> Sequence[Kind]:
        return self._load.kinds

    def forecast(self, workers: int) -> Forecast:
        return self._forecast(workers, self._load.requests)

    def _forecast(self, workers: int, requests: int) -> Forecast:
        load = self._load
        calls = poisson(load.kinds, load.rate, requests, load.new_prompts, load.seed)
        outcome = self._run(workers, calls)
        latencies = sorted(outcome.latencies)
        p99_s = quantile(latencies, OBJECTIVE)
        return Forecast(
            workers=workers,
            kept=p99_s is not None and p99_s <= self._p99_s,
            p50_s=quantile(latencies, 0.5),
            p99_s=p99_s,
            refused=sum(map(math.isinf, latencies)) / len(latencies),
            busy=outcome.busy_s / (workers * outcome.span_s),
            rows=outcome.rows / max(outcome.steps, 1),
        )

    def search(self, told: Callable[[Forecast], None]) -> list[Forecast]:
        """Forecasts around the least number of workers that keeps the objective, by workers.

        told: of each forecast as it is made. Raises: PlanError when no number can.
        """
        self._check_possible()
        least = self._load.least_workers
        made: dict[int, Forecast] = {}

        def kept(workers: int) -> bool:
            made[workers] = self.forecast(workers)
            told(made[workers])
            return made[workers].kept

        few = min(max(self._load.requests // FIRST_LOOK, LEAST_REQUESTS), self._load.requests)
        guess = find_least(lambda workers: self._forecast(workers, few).kept, least, least)
        enough = find_least(kept, least, guess)
        for workers in range(max(1, enough - FEWER), enough + MORE + 1):
            if workers not in made:
                kept(workers)
        return [made[workers] for workers in sorted(made)]

    def alone_s(self, kind: Kind) -> float:
        """Seconds of a request with a worker to itself."""
        call = Call(0.0, kind, self._load.new_prompts > 0, kind.request.n)
        return self._run(1, [call]).latencies[0]

    def _check_possible(self) -> None:
        times = sorted((self.alone_s(kind), kind.share) for kind in self._load.kinds)
        late = sum(share for seconds, share in times if seconds > self._p99_s)
        if late > 1 - OBJECTIVE + 1e-9:
            raise PlanError(
                f"No number of workers keeps a p99 of {self._p99_s:g} s: {late:.0%} of the requests take longer "
                f"even alone, up to {times[-1][0]:.3g} s."
            )

    def _run(self, workers: int, calls: Iterable[Call]) -> Outcome:
        return Fleet(workers, self._limits, self._admission, self._load.seed).run(calls)


def find_least(kept: Callable[[int], bool], least: int, guess: int) -> int:
    """The least number from ``least`` on that is kept, where all from it on are; looks around a guess ≥ least.

    Raises: PlanError beyond MAX_WORKERS.
    """
    short, enough = least - 1, MAX_WORKERS + 1
    at, stride, missed = guess, 1, False
    while enough - short > 1:
        if kept(at):
            enough = at
        else:
            short, missed = at, True
        if enough > MAX_WORKERS:
            at = min(short + stride, MAX_WORKERS)
        elif missed:
            at = (short + enough) // 2
        else:
            at = max(enough - stride, least)
        stride *= 2
    if enough > MAX_WORKERS:
        raise PlanError(f"More than {MAX_WORKERS} workers would be needed; plan for a part of the load.")
    return enough


def quantile(ordered: Sequence[float], q: float) -> float | None:
    """The nearest rank: the least value that a part q of all does not exceed; None for an infinite one."""
    value = ordered[math.ceil(q * len(ordered) - 1e-9) - 1]  # 0.99 of 100 is 99, not a little more
    return value if math.isfinite(value) else None


def admission_of(
    bundles: Sequence[tuple[Bundle, CostTable]], kinds: Sequence[Kind], max_queue_s: float, max_queued_rows: int
) -> Admission:
    """The server's, whose predictions for the kinds of a plan are made once."""
    book = CostBook()
    book.update({"plan": {b.manifest.name: Offer(engine="", ms=_plain(costs)) for b, costs in bundles}})
    manifests = {bundle.manifest.name: bundle.manifest for bundle, _ in bundles}
    known = {id(kind.request): book.predicted_s(manifests[kind.request.model], kind.request) for kind in kinds}

    def predict_s(request: DenoiseRequest) -> float:
        return known[id(request)]

    catalogue = Catalogue(Model.of(bundle, predict_s) for bundle, _ in bundles)
    return Admission(catalogue, max_queue_s, max_queued_rows)


def _plain(costs: CostTable) -> dict[str, dict[int, float]]:
    return {call: dict(rungs) for call, rungs in costs.ms.items()}
