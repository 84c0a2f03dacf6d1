"""docs/benchmarks.md: threads, streams and the model cache of OpenVINO."""

from __future__ import annotations

from tests.benchmarks.page_parts import origin, short, table
from tests.benchmarks.results import Streams

WORDS = """## Threads, streams and the model cache of OpenVINO

One step of the student above, float32 and int8. *Streams*: one request on all threads, as the engine runs it, or
the batch shared between streams of one thread each, at once. Each figure is the median of {rounds} rounds of 4
steps; settings alternate. A start without the cache compiles the graph for one batch size and runs it; a later one
finds it compiled (`python -m engines build`, or the server's `--cache-dir`).
"""


def streams_section(result: Streams) -> str:
    batches = tuple(dict.fromkeys(setting.batch for setting in result.settings))
    kinds = tuple(dict.fromkeys((s.dtype, s.streams, s.threads) for s in result.settings))
    ms = {(s.dtype, s.streams, s.threads, s.batch): s.ms_per_step for s in result.settings}
    rows = [
        (f"{kind[0]}, {_named(kind[1], kind[2])}", *(_cell(ms.get((*kind, batch))) for batch in batches))
        for kind in kinds
    ]
    return "\n".join(
        (
            WORDS.format(rounds=result.rounds),
            origin(result.provenance, result.provenance.command),
            table(("ms per step, at batch", *map(str, batches)), rows),
            *(
                f"- First run at batch {found.batch}, {found.dtype}: {short(found.cold_s)} s, "
                f"from the cache {short(found.cached_s)} s."
                for found in result.compilations
            ),
            "",
        )
    )


def _named(streams: int, threads: int) -> str:
    one = "1 stream" if streams == 1 else f"{streams} streams"
    return f"{one}, {threads} thread{'s' if threads > 1 else ''}"


def _cell(ms: float | None) -> str:
    return "–" if ms is None else short(ms)
