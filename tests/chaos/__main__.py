"""``python -m tests.chaos [small|full|plants|cancels|soak]``: verdicts as tables; exit 1 for what they find."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.chaos import cancels, soak
from tests.chaos.harness import Plan, Verdict, run
from tests.chaos.plants import PLANTS
from tests.support.toy_bundle import ToyOptions, make_toy_bundle

PLANS = {
    "small": Plan(
        jobs=3000,
        seconds=120,
        worker_kills=30,
        api_kills=6,
        redis_kills=3,
        freezes=6,
        cuts=3,
        memory_shortages=3,
        full_disks=1,
        poison=5,
    ),
    "full": Plan(
        jobs=10_000,
        seconds=270,
        worker_kills=100,
        api_kills=20,
        redis_kills=10,
        freezes=20,
        cuts=10,
        memory_shortages=10,
        full_disks=3,
        poison=10,
    ),
}
CANCELS = (
    cancels.Storm(cancels=1000, step_s=0.015, redis=False),
    cancels.Storm(cancels=1000, step_s=0.015, redis=True),
)
PLANT = Plan(240, 15, workers=3, worker_kills=4, api_kills=3, redis_kills=1, freezes=2, poison=1)
"""The load under which a planted bug must show, but for those of ``LOADS``."""

LOADS = {
    "too many attempts": Plan(120, 6, workers=2),
    "innocent failed": Plan(240, 8, workers=2, poison=12),
}
"""By what a bug is seen as: no faults, which would excuse further attempts; poison enough to have company."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Faults, storms and soaks.")
    parser.add_argument("what", nargs="?", default="small", choices=[*PLANS, "plants", "cancels", "soak"])
    parser.add_argument("--minutes", type=float, default=120, help="how long a soak lasts (default: 120)")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = make_toy_bundle(Path(folder) / "toy", ToyOptions()).path
        if chosen.what == "soak":
            return soak.tell(soak.run(chosen.minutes, bundle))
        if chosen.what == "cancels":
            return cancels.tell([cancels.run(storm, bundle) for storm in CANCELS])
        return judge(chosen.what, bundle, Path(folder) / "log")


def judge(what: str, bundle: Path, log: Path) -> int:
    """Run a plan, or a small one with each bug planted; exit status."""
    if what == "plants":
        plans = [PLANT, *LOADS.values()]
        plans += [replace(LOADS.get(each.seen_as, PLANT), plant=name) for name, each in PLANTS.items()]
        verdicts = [run(plan, bundle, log) for plan in plans]
    else:
        verdicts = [run(PLANS[what], bundle, log)]
    show(verdicts)
    sound = all(verdict.sound for verdict in verdicts)
    if not sound:
        Console(stderr=True).print(log.read_text()[-20_000:], markup=False, highlight=False)
    return 0 if sound else 1


def show(verdicts: list[Verdict]) -> None:
    table = Table("planted", "jobs", "seconds", "attempts a job", "accepted", "ended", "faults seen")
    for verdict in verdicts:
        faults = ", ".join(f"{count} {name}" for name, count in verdict.faults.items()) or "none"
        figures = (f"{verdict.seconds:.0f}", f"{verdict.attempts:.3f}", str(verdict.accepted), str(verdict.ended))
        table.add_row(verdict.plan.plant or "nothing", str(verdict.plan.jobs), *figures, faults)
    console = Console(width=160)
    console.print(table)
    for verdict in verdicts:
        for example in verdict.examples:
            console.print(f"{verdict.plan.plant or 'nothing'}: {example}", markup=False, highlight=False)


if __name__ == "__main__":
    raise SystemExit(main())
