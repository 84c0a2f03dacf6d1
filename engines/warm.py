"""First runs, made before any request could pay for one."""

from __future__ import annotations

import logging
from itertools import product

from engines.calls import Call, calls
from engines.errors import OutOfMemoryError
from engines.examples import example_inputs
from engines.pipeline import Pipeline

_log = logging.getLogger(__name__)


def warm(pipeline: Pipeline) -> None:
    """Run every graph once at every size and rung, the largest first, whose memory smaller ones share.

    While all of them do not fit together, the largest rung is given up. Raises: OutOfMemoryError when not even the
    smallest fits; BackendError.
    """
    while (reason := _run_all(pipeline)) is not None:
        *smaller, largest = pipeline.rungs
        if not smaller:
            raise OutOfMemoryError(f"not even the smallest batch size fits into memory: {reason}")
        _log.warning("no call is given more rows than %d here: %s", smaller[-1], reason)
        pipeline.give_up(largest)
        pipeline.release()


def _run_all(pipeline: Pipeline) -> str | None:
    """What an engine says that finds no memory; its error itself would hold what it computed so far."""
    for rung, call in sorted(product(pipeline.rungs, calls(pipeline.manifest)), key=_extent, reverse=True):
        inputs = example_inputs(pipeline.manifest, pipeline.tokenizer, call.graph, rung, size=call.size)
        try:
            pipeline.engine(call.graph).run(inputs)
        except OutOfMemoryError as error:
            return str(error)
    return None


def _extent(pair: tuple[int, Call]) -> tuple[int, int]:
    """Rows, then pixels of each."""
    rung, call = pair
    return rung, call.size.width * call.size.height
