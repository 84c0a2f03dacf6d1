"""What a benchmark's last line holds: where it ran, and its figures."""

from __future__ import annotations

import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version

import psutil

from engines.machine import machine_name
from engines.manifest import Frozen

LIBRARIES = ("torch", "diffusers", "onnxruntime", "openvino", "nncf", "numpy")
DRAWS = 1000
"""Times that the rounds of goodput are drawn anew, for the spread of a ratio."""


class Provenance(Frozen):
    """All that a figure depends on besides the code.

    others_cpu: share of all cores that other processes (or, on a virtual machine, other machines) took while it
    ran, 0 … 1.
    """

    machine: str
    versions: dict[str, str]
    seed: int
    command: str
    date: str
    others_cpu: float


class Row(Frozen):
    """One contender at one batch size.

    ms_per_step: median over the rounds; fastest_ms, slowest_ms: the extremes. max_abs_difference: of the final
    latents from those of eager torch float32.
    """

    contender: str
    batch: int
    ms_per_step: float
    fastest_ms: float
    slowest_ms: float
    images_per_s: float
    max_abs_difference: float


class Ratio(Frozen):
    """Images/s of one contender over another's at one batch size: the median of the rounds' own ratios."""

    contender: str
    over: str
    batch: int
    ratio: float


class Throughput(Frozen):
    """All rows of one run. latent: (C, h, w)."""

    provenance: Provenance
    parameters: int
    latent: tuple[int, int, int]
    steps: int
    rounds: int
    rows: tuple[Row, ...]
    ratios: tuple[Ratio, ...]

    def contenders(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.contender for row in self.rows))

    def batches(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(row.batch for row in self.rows))

    def row(self, contender: str, batch: int) -> Row:
        return next(row for row in self.rows if (row.contender, row.batch) == (contender, batch))

    def best(self, contender: str) -> Row:
        """The row of most images/s."""
        return max((row for row in self.rows if row.contender == contender), key=lambda row: row.images_per_s)


class Setting(Frozen):
    """One arrangement of OpenVINO. threads: of all streams together; ms_per_step: of the whole batch."""

    dtype: str
    streams: int
    threads: int
    batch: int
    ms_per_step: float


class Compilation(Frozen):
    """Seconds to an engine's first result at one batch size, with and without its compiled model in the cache."""

    dtype: str
    batch: int
    cold_s: float
    cached_s: float


class Streams(Frozen):
    """What ``streams`` prints."""

    provenance: Provenance
    rounds: int
    settings: tuple[Setting, ...]
    compilations: tuple[Compilation, ...]


class Overhead(Frozen, extra="ignore"):
    """What ``http_overhead`` prints of one bundle.

    http_over_raw: by the wall clock, which the load client's work slows; http_over_raw_apart and http_apart_p50_ms:
    with the client's CPU time taken off; raw_cpu_over_server_cpu: CPU seconds an image.
    """

    provenance: Provenance
    bundle: str
    engine: str
    rounds: int
    bare_p50_ms: float
    http_p50_ms: float
    http_apart_p50_ms: float
    overhead_p50_ms: float
    raw_images_per_s: float
    http_images_per_s: float
    http_over_raw: float
    http_over_raw_apart: float
    raw_cpu_over_server_cpu: float

    @property
    def p50_ratio(self) -> float:
        return self.http_p50_ms / self.bare_p50_ms

    @property
    def p50_ratio_apart(self) -> float:
        return self.http_apart_p50_ms / self.bare_p50_ms


class Outcome(Frozen):
    """Of one open-loop load. offered: requests a second; goodput: right answers within the objective a second.

    within: share of the requests that were; rejected: 429 and 503; wrong: 200 with another picture than the wish's;
    p50_ms, p99_ms: of the right answers, None where there were none.
    """

    offered: float
    goodput: float
    within: float
    rejected: int
    failed: int
    wrong: int
    p50_ms: float | None
    p99_ms: float | None


class Pace(Frozen):
    """Without a server. lone_ms: one request of the most steps; images_per_s: whole batches of like steps."""

    lone_ms: float
    images_per_s: float


class Point(Frozen):
    """One contender under one load. load: rate offered over ``pace.images_per_s``, measured before."""

    contender: str
    load: float
    round: int
    pace: Pace
    outcome: Outcome


class Goodput(Frozen):
    """What ``goodput`` prints of one bundle. contenders: in the order of ``servers``; screened: of LitServe."""

    provenance: Provenance
    bundle: str
    engine: str
    steps: tuple[int, ...]
    one_graph: bool
    tasks: tuple[str, ...]
    rounds: int
    seconds: float
    objective_of_lone: float
    enough_within: float
    contenders: tuple[str, ...]
    screened: tuple[Point, ...]
    points: tuple[Point, ...]

    @property
    def lone_ms(self) -> float:
        """The median of all paces."""
        return statistics.median(point.pace.lone_ms for point in self.points)

    @property
    def raw_images_per_s(self) -> float:
        """The median of all paces."""
        return statistics.median(point.pace.images_per_s for point in self.points)

    def shares(self, contender: str, rounds: Sequence[int]) -> dict[float, float]:
        """Within the objective at each load, median of the rounds; one that did not get so far counts as 0."""
        found: dict[float, dict[int, float]] = {}
        for point in self.points:
            if point.contender == contender:
                found.setdefault(point.load, {})[point.round] = point.outcome.within
        return {
            load: statistics.median(within.get(number, 0.0) for number in rounds)
            for load, within in sorted(found.items())
        }

    def rate_kept(self, contender: str, rounds: Sequence[int] | None = None) -> float:
        """The load at which the share falls below enough, between two loads in proportion; 0 where it never was.

        rounds: those that count, one as often as it is named.
        """
        kept, above = 0.0, 1.0
        for load, share in self.shares(contender, range(self.rounds) if rounds is None else rounds).items():
            if share < self.enough_within:
                part = (above - self.enough_within) / (above - share)
                return kept + part * (load - kept) if kept else 0.0
            kept, above = load, share
        return kept

    def sustained(self, contender: str) -> float:
        """Goodput a second at the rate kept."""
        return self.enough_within * self.raw_images_per_s * self.rate_kept(contender)

    def over(self, contender: str, other: str) -> tuple[float, float, float]:
        """Ratio of the rates kept, and its 5th and 95th percentile over rounds drawn anew; infinite over 0."""
        chosen = random.Random(0)
        drawn = sorted(
            self._ratio(contender, other, chosen.choices(range(self.rounds), k=self.rounds)) for _ in range(DRAWS)
        )
        whole = self._ratio(contender, other, range(self.rounds))
        return whole, drawn[DRAWS // 20], drawn[DRAWS - 1 - DRAWS // 20]

    def _ratio(self, contender: str, other: str, rounds: Sequence[int]) -> float:
        its = self.rate_kept(other, rounds)
        return self.rate_kept(contender, rounds) / its if its else math.inf


class Results(Frozen):
    """What the page is written from; None: not measured yet. random, digits: the HTTP overhead of those bundles."""

    throughput: Throughput | None = None
    streams: Streams | None = None
    random: Overhead | None = None
    digits: Overhead | None = None
    goodput: Goodput | None = None
    goodput_separate: Goodput | None = None


class Watch:
    """Started before a measurement: tells afterwards how much of the machine was not ours."""

    def __init__(self) -> None:
        self._begun, self._all, self._ours = time.monotonic(), _busy_s(), own_s()
        self._unwaited_s = 0.0

    def ran(self, cpu_s: float) -> None:
        """Count CPU of processes that were ours and that nobody waited for."""
        self._unwaited_s += cpu_s

    def others_cpu(self) -> float:
        """Share of all cores since the start; children count as ours once they were waited for."""
        others = (_busy_s() - self._all) - (own_s() - self._ours) - self._unwaited_s
        return max(0.0, others / (psutil.cpu_count() or 1) / (time.monotonic() - self._begun))

    def provenance(self, module: str, seed: int) -> Provenance:
        """This process, machine and moment."""
        return Provenance(
            machine=machine_name(),
            versions={"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
            seed=seed,
            command=" ".join(("python -m", module, *sys.argv[1:])),
            date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            others_cpu=round(self.others_cpu(), 3),
        )


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def own_s() -> float:
    """CPU seconds of this process and of the children it waited for."""
    return sum(os.times()[:4])
