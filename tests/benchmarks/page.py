"""docs/benchmarks.md: the words around the tables. Every figure comes from the results of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from tests.benchmarks.contenders import (
    EAGER,
    EAGER_BF16,
    OPENVINO,
    OPENVINO_BF16,
    OPENVINO_INT8,
    PIPELINE,
    PIPELINE_BF16,
)
from tests.benchmarks.page_goodput import goodput_section, over_litserve
from tests.benchmarks.page_parts import is_quiet, origin, repeat, short, table
from tests.benchmarks.page_streams import streams_section
from tests.benchmarks.results import Goodput, Overhead, Results, Row, Throughput

HEAD = """# Benchmarks

Written by `python -m tests.benchmarks` (`make prove`), which replaces this file; each part names the command that
repeats it and when it ran, and `--only PART` measures one of them anew.
Contenders alternate inside one run and medians are given; ratios carry over to other machines, milliseconds do not.
Benchmarks record; no test asserts a time.
"""

THROUGHPUT = """## One student on every backend

{steps} denoising steps from noise to latents of {latent}, on one student of {million:.1f} M parameters with random
weights, the same in every contender: no condition, decode or encode. *Diffusers pipeline* is the stock
`StableDiffusionPipeline` with its DDIM scheduler and the student's `unet/`, given condition and noise, and the
latents taken; *eager torch* is the same network with the sampler's update alone; the others run the bundle's
exported step graph, update and inpainting blend included, *int8* after `python -m engines quantize`. One guidance
for all rows, as the pipeline takes it. Each figure is the median of {rounds} trajectories, each after one untimed
step. What int8 costs in quality: [decision 0007](decisions/0007-int8-is-a-bundle.md).
"""

HTTP = """## What HTTP, jobs and batching cost

One server process (`python -m server serve`, memory store) against the same pipeline called directly, PNG files
included in both. *Alone*: one client, one request at a time, p50 of the whole request, next to the bare call chain.
*Full*: 64 clients in a closed loop, next to a raw loop (steps, decode, encode) at the best batch size by the cost
table. The client shares the server's cores, so ratios are given by the wall clock, and *client apart*: with the
client's CPU seconds taken off the wall time, those of 64 clients spread over the cores. Its CPU is mostly its own
library's (httpx). CPU an image compares CPU seconds alone.
Closed loops measure capacity, not latency under load.
"""

MISSING = "Not measured: {parts}.\n"

Part = Throughput | Overhead | Goodput


class Target(NamedTuple):
    """What was wanted and what came out; quiet: of a machine that had little else to do."""

    what: str
    wanted: str
    measured: str
    met: bool
    quiet: bool

    @property
    def verdict(self) -> str:
        if not self.quiet:
            return "not judged"
        return "met" if self.met else "**missed**"


def page(results: Results) -> str:
    """The whole file, with what was not measured named."""
    missing = [name for name, part in results if part is None]
    parts = [
        HEAD,
        MISSING.format(parts=", ".join(missing)) if missing else "",
        "## Targets\n",
        table(("target", "wanted", "measured", ""), [(*t[:3], t.verdict) for t in targets(results)]),
        "" if results.throughput is None else _throughput_section(results.throughput),
        "" if results.streams is None else streams_section(results.streams),
        _http_section(results),
        *(goodput_section(found) for found in (results.goodput, results.goodput_separate) if found is not None),
    ]
    return "\n".join(part for part in parts if part)


def targets(results: Results) -> list[Target]:
    """Of what was measured."""
    found = []
    if results.throughput is not None:
        found += _throughput_targets(results.throughput)
    if results.random is not None:
        what = "images/s through HTTP over the raw loop, client apart"
        found.append(_at_least(results.random, what, results.random.http_over_raw_apart, 0.90))
        what = "p50 through HTTP, alone, over the bare chain, client apart"
        found.append(_at_most(results.random, what, results.random.p50_ratio_apart, 1.15))
    if results.digits is not None:
        what = f"{results.digits.bundle}: p50 overhead of HTTP over the bare chain, alone"
        found.append(_at_most(results.digits, what, results.digits.overhead_p50_ms, 5.0, " ms"))
    if results.goodput is not None:
        what = "goodput over LitServe's, its settings swept, mixed tasks, N and guidance"
        found.append(_at_least(results.goodput, what, over_litserve(results.goodput), 1.3))
    return found


def _throughput_targets(of: Throughput) -> Iterator[Target]:
    """Each contender at its best batch, the others in the faster of their types."""
    others = {
        "the stock diffusers pipeline": (_best(of, PIPELINE, PIPELINE_BF16), 2.0),
        "eager torch": (_best(of, EAGER, EAGER_BF16), 1.5),
    }
    for ours in (OPENVINO_INT8, OPENVINO):
        for name, (other, wanted) in others.items():
            what = f"images/s of {ours} over {name} in the faster of its types, each at its best batch"
            yield _at_least(of, what, _best(of, ours) / other, wanted)
    what = f"images/s of {OPENVINO_INT8} over {OPENVINO_BF16}, each at its best batch"
    yield _at_least(of, what, _best(of, OPENVINO_INT8) / _best(of, OPENVINO_BF16), 1.3)


def _best(of: Throughput, *names: str) -> float:
    """Most images/s of any of these."""
    return max(of.best(name).images_per_s for name in names)


def _at_least(of: Part, what: str, measured: float, wanted: float) -> Target:
    return Target(what, f"≥ {wanted:g}", _beside(measured, wanted), measured >= wanted, is_quiet(of.provenance))


def _at_most(of: Part, what: str, measured: float, wanted: float, unit: str = "") -> Target:
    shown = (f"≤ {wanted:g}{unit}", f"{_beside(measured, wanted)}{unit}")
    return Target(what, *shown, measured <= wanted, is_quiet(of.provenance))


def _beside(measured: float, wanted: float) -> str:
    """To two digits, or to three where two would hide on which side of ``wanted`` it is."""
    short = f"{measured:.2f}"
    return f"{measured:.3f}" if float(short) == wanted else short


def _http_section(results: Results) -> str:
    overheads = [overhead for overhead in (results.random, results.digits) if overhead is not None]
    if not overheads:
        return ""
    lines = [origin(o.provenance, repeat(o.provenance.command, o.bundle), o.bundle) for o in overheads]
    return "\n".join([HTTP, *lines, _overhead_table({o.bundle: o for o in overheads})])


def _throughput_section(result: Throughput) -> str:
    latent = " × ".join(map(str, result.latent))
    million = result.parameters / 1e6
    words = THROUGHPUT.format(steps=result.steps, latent=latent, million=million, rounds=result.rounds)
    batches = result.batches()
    parts = [
        words,
        origin(result.provenance, result.provenance.command),
        _by_batch("ms per step, at batch", result, lambda row: short(row.ms_per_step)),
        _by_batch(f"images/s at N = {result.steps}, at batch", result, lambda row: short(row.images_per_s)),
        table(("ratio of images/s, at batch", *map(str, batches)), _ratio_rows(result)),
        *_remarks(result),
    ]
    return "\n".join(parts)


def _by_batch(corner: str, result: Throughput, cell: Callable[[Row], str]) -> str:
    batches = result.batches()
    rows = [(name, *(cell(result.row(name, size)) for size in batches)) for name in result.contenders()]
    return table((corner, *map(str, batches)), rows)


def _ratio_rows(result: Throughput) -> list[tuple[str, ...]]:
    pairs = dict.fromkeys((ratio.contender, ratio.over) for ratio in result.ratios)
    return [
        (f"{a} / {b}", *(f"{r.ratio:.2f}" for r in result.ratios if (r.contender, r.over) == (a, b)))
        for a, b in pairs
    ]


def _remarks(result: Throughput) -> list[str]:
    """What the figures say, computed from them."""
    over_eager = {
        name: [r.ratio for r in result.ratios if (r.contender, r.over) == (name, EAGER)]
        for name in (OPENVINO, OPENVINO_INT8)
    }
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
        "- Over the images/s of eager torch float32: "
        + "; ".join(f"{name} {min(found):.2f} to {max(found):.2f} ×" for name, found in over_eager.items())
        + ".",
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
        "alone: through HTTP, client apart, p50 ms": lambda o: f"{o.http_apart_p50_ms:.2f}",
        "alone: overhead, p50 of the pairs, ms": lambda o: f"{o.overhead_p50_ms:.2f}",
        "alone: HTTP / bare": lambda o: f"{o.p50_ratio:.3f}",
        "alone: HTTP / bare, client apart": lambda o: f"{o.p50_ratio_apart:.3f}",
        "full: raw loop, images/s": lambda o: f"{o.raw_images_per_s:.1f}",
        "full: through HTTP, images/s": lambda o: f"{o.http_images_per_s:.1f}",
        "full: HTTP / raw, wall clock": lambda o: f"{o.http_over_raw:.3f}",
        "full: HTTP / raw, client apart": lambda o: f"{o.http_over_raw_apart:.3f}",
        "full: CPU an image, raw / server": lambda o: f"{o.raw_cpu_over_server_cpu:.3f}",
    }
    rows = [(name, *(show(o) for o in overheads.values())) for name, show in figures.items()]
    return table(("bundle", *overheads), rows)
