"""docs/benchmarks.md: the words around the tables. Every figure comes from the results of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from tests.benchmarks.contenders import EAGER, EAGER_BF16, OPENVINO, OPENVINO_BF16
from tests.benchmarks.results import Overhead, Provenance, Row, Throughput, short

QUIET = 0.1
"""Share of the CPU that others may take during a run whose figures mean something."""

TARGETS = {"eager": 2.0, "http_over_raw": 0.90, "p50_ratio": 1.15, "digits_overhead_ms": 5.0}
"""See shared/performance.md and the issue: at least, at least, at most, at most."""

HEAD = """# Benchmarks

Written by `python -m tests.benchmarks` (`make prove`), which replaces this file: every figure below is of that run.
Contenders alternate inside one run and medians are given; ratios carry over to other machines, milliseconds do not.
Benchmarks record; no test asserts a time.
"""

THROUGHPUT = """## One student on every backend

{steps} denoising steps from noise to latents of {latent}, on one student of {million:.1f} M parameters with random
weights, the same in every contender: no condition, decode or encode. *Eager torch* is the stock diffusers
`UNet2DConditionModel` with the sampler's update, called as a diffusers pipeline calls it; the others run the
bundle's exported step graph, update and inpainting blend included. Each figure is the median of {rounds}
trajectories, each after one untimed step.
"""

HTTP = """## What HTTP, jobs and batching cost

One server process (`python -m server serve`, memory store) against the same pipeline called directly, PNG files
included in both. *Alone*: one client, one request at a time, p50 of the whole request, next to the bare call chain.
*Full*: 64 clients in a closed loop, next to a raw loop (steps, decode, encode) at the best batch size by the cost
table. The load client shares the server's cores, so the ratio is given by the wall clock, and *client apart*: with
the client's CPU seconds, spread over the cores, taken off the wall time. CPU an image compares CPU seconds alone.
Closed loops measure capacity, not latency under load.
"""

MISSING = "No `{path}` in this checkout: the digits bundle was not measured.\n"


class Target(NamedTuple):
    """What was wanted and what came out."""

    what: str
    wanted: str
    measured: str
    met: bool


def page(throughput: Throughput, random: Overhead, random_command: str, digits: Overhead | None, path: str) -> str:
    """The whole file. random_command: how to repeat the run of ``random``; path: where digits was looked for."""
    overheads = {f"random, {throughput.parameters / 1e6:.1f} M": random}
    if digits is not None:
        overheads[digits.bundle] = digits
    targets = [*_throughput_targets(throughput), *_http_targets(random, digits)]
    busiest = max(o.others_cpu for o in (throughput.provenance, *(o.provenance for o in overheads.values())))
    commands = {name: o.provenance.command for name, o in overheads.items()}
    commands[next(iter(commands))] = random_command
    parts = [
        HEAD,
        _quiet_note(busiest),
        "## Targets\n",
        _table(("target", "wanted", "measured", ""), [(*t[:3], _verdict(t, busiest)) for t in targets]),
        _throughput_section(throughput),
        HTTP,
        *(_origin(o.provenance, commands[name], name) for name, o in overheads.items()),
        _overhead_table(overheads),
        "" if digits is not None else MISSING.format(path=path),
    ]
    return "\n".join(part for part in parts if part)


def _throughput_targets(result: Throughput) -> list[Target]:
    ours, eager = result.best(OPENVINO), result.best(EAGER)
    ratio, wanted = ours.images_per_s / eager.images_per_s, TARGETS["eager"]
    what = "images/s of OpenVINO float32 over eager torch float32 (stock diffusers), each at its best batch"
    return [Target(what, f"≥ {wanted:g}", f"{ratio:.2f}", ratio >= wanted)]


def _http_targets(random: Overhead, digits: Overhead | None) -> list[Target]:
    full, low, digits_ms = (TARGETS[name] for name in ("http_over_raw", "p50_ratio", "digits_overhead_ms"))
    apart, p50 = random.http_over_raw_apart, random.p50_ratio
    found = [
        Target(
            "images/s through HTTP over the raw loop, client apart", f"≥ {full:.2f}", f"{apart:.2f}", apart >= full
        ),
        Target("p50 through HTTP, alone, over the bare chain", f"≤ {low:.2f}", f"{p50:.2f}", p50 <= low),
    ]
    if digits is not None:
        ms = digits.overhead_p50_ms
        what = f"{digits.bundle}: p50 overhead of HTTP over the bare chain, alone"
        found.append(Target(what, f"≤ {digits_ms:g} ms", f"{ms:.1f} ms", ms <= digits_ms))
    return found


def _throughput_section(result: Throughput) -> str:
    latent = " × ".join(map(str, result.latent))
    million = result.parameters / 1e6
    words = THROUGHPUT.format(steps=result.steps, latent=latent, million=million, rounds=result.rounds)
    batches = result.batches()
    parts = [
        words,
        _origin(result.provenance, result.provenance.command),
        _by_batch("ms per step, at batch", result, lambda row: short(row.ms_per_step)),
        _by_batch(f"images/s at N = {result.steps}, at batch", result, lambda row: short(row.images_per_s)),
        _table(("ratio of images/s, at batch", *map(str, batches)), _ratio_rows(result)),
        *_remarks(result),
    ]
    return "\n".join(parts)


def _by_batch(corner: str, result: Throughput, cell: Callable[[Row], str]) -> str:
    batches = result.batches()
    rows = [(name, *(cell(result.row(name, size)) for size in batches)) for name in result.contenders()]
    return _table((corner, *map(str, batches)), rows)


def _ratio_rows(result: Throughput) -> list[tuple[str, ...]]:
    pairs = dict.fromkeys((ratio.contender, ratio.over) for ratio in result.ratios)
    return [
        (f"{a} / {b}", *(f"{r.ratio:.2f}" for r in result.ratios if (r.contender, r.over) == (a, b)))
        for a, b in pairs
    ]


def _remarks(result: Throughput) -> list[str]:
    """What the figures say, computed from them."""
    ratios = [r.ratio for r in result.ratios if (r.contender, r.over) == (OPENVINO, EAGER)]
    best = sorted((result.best(name) for name in result.contenders()), key=lambda row: -row.images_per_s)
    bf16 = result.best(OPENVINO_BF16).images_per_s / result.best(OPENVINO).images_per_s
    autocast = result.best(EAGER_BF16).images_per_s / result.best(EAGER).images_per_s
    wobble = max(row.slowest_ms / row.fastest_ms for row in result.rows)
    largest = {
        name: max(row.max_abs_difference for row in result.rows if row.contender == name)
        for name in result.contenders()
        if name != EAGER
    }
    return [
        f"- OpenVINO float32 gives {min(ratios):.2f} to {max(ratios):.2f} × the images/s of eager torch float32.",
        "- Best batch: "
        + "; ".join(f"{r.contender} {short(r.images_per_s)} images/s at {r.batch}" for r in best)
        + ".",
        f"- At their best batches bfloat16 is {bf16:.2f} × float32 in OpenVINO, {autocast:.2f} × in eager torch; "
        "the machine's line above names its bfloat16 units, where it has any.",
        "- Largest difference of a final latent (about unit variance) from eager torch float32: "
        + "; ".join(f"{name} {value:.2g}" for name, value in largest.items())
        + ".",
        f"- Slowest over fastest round of one row, at worst: {wobble:.2f}.\n",
    ]


def _overhead_table(overheads: dict[str, Overhead]) -> str:
    figures: dict[str, Callable[[Overhead], str]] = {
        "engine": lambda o: o.engine,
        "rounds": lambda o: str(o.rounds),
        "alone: bare chain, p50 ms": lambda o: f"{o.bare_p50_ms:.2f}",
        "alone: through HTTP, p50 ms": lambda o: f"{o.http_p50_ms:.2f}",
        "alone: overhead, p50 of the pairs, ms": lambda o: f"{o.overhead_p50_ms:.2f}",
        "alone: HTTP / bare": lambda o: f"{o.p50_ratio:.3f}",
        "full: raw loop, images/s": lambda o: f"{o.raw_images_per_s:.1f}",
        "full: through HTTP, images/s": lambda o: f"{o.http_images_per_s:.1f}",
        "full: HTTP / raw, wall clock": lambda o: f"{o.http_over_raw:.3f}",
        "full: HTTP / raw, client apart": lambda o: f"{o.http_over_raw_apart:.3f}",
        "full: CPU an image, raw / server": lambda o: f"{o.raw_cpu_over_server_cpu:.3f}",
    }
    rows = [(name, *(show(o) for o in overheads.values())) for name, show in figures.items()]
    return _table(("bundle", *overheads), rows)


def _verdict(target: Target, busiest: float) -> str:
    if busiest > QUIET:
        return "not judged"
    return "met" if target.met else "**missed**"


def _quiet_note(busiest: float) -> str:
    if busiest <= QUIET:
        return ""
    share = f"{100 * busiest:.0f} %"
    return f"> **Not a quiet machine**: others took {share} of the CPU during a run. Do not trust these figures.\n"


def _origin(origin: Provenance, command: str, name: str = "") -> str:
    versions = ", ".join(f"{library} {number}" for library, number in origin.versions.items())
    lines = [
        f"- {name + ': ' if name else ''}`{command}`",
        f"- {origin.machine}; {versions}; seed {origin.seed}; {origin.date}; "
        f"CPU taken by others meanwhile: {100 * origin.others_cpu:.0f} %\n",
    ]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
