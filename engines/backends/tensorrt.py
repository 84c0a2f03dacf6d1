"""TensorRT on an NVIDIA GPU: a plan for this very GPU, a static profile, context and CUDA graph a rung and size.

``tensorrt`` and ``tensorrt_rtx`` have nearly one API: ``engines.backends.tensorrt_build`` and ``tensorrt_run`` say
where they differ. Buffers, the stream and graph capture are torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from engines.backends.base import RUNGS, OfGraph, Precision, Rows
from engines.backends.cuda import find_device
from engines.backends.plan_store import PlanStore
from engines.backends.tensorrt_build import Network, check_target, find_library, library_name
from engines.errors import BackendError, OutOfMemoryError
from engines.manifest import GraphSpec, Size


class TensorRtBackend(OfGraph):
    """One graph on the current CUDA device.

    precision: of the network body. rungs: batch sizes to be ready for; a batch between two is filled up, one
    beyond the largest runs in pieces. sizes: of images to be ready for, where the graph takes several. store: where
    the plan is kept, or None to build it every time.
    Raises: OutOfMemoryError when the plan does not fit into the GPU; BackendError when there is no library or GPU,
    or the graph cannot be built.
    """

    def __init__(
        self,
        file: Path,
        spec: GraphSpec,
        *,
        precision: Precision = "float32",
        rungs: Sequence[int] = RUNGS,
        sizes: Sequence[Size] = (),
        store: PlanStore | None = None,
    ) -> None:
        trt = find_library()
        check_target(trt, find_device())
        from engines.backends.tensorrt_run import LoadedPlan  # noqa: PLC0415 - imports torch, and needs a GPU

        self._spec = spec
        self._precision = precision
        rungs = tuple(sorted(rungs))

        def load(plan: bytes) -> LoadedPlan | None:
            return LoadedPlan.open(trt, plan, spec, rungs, sizes, store)

        def build() -> bytes:
            return build_plan(file, spec, precision, rungs, sizes, store)

        try:
            self._plan = load(build()) if store is None else store.obtain(load, build)
            if self._plan is None:
                raise BackendError(f"{library_name(trt)} does not load the plan it has just built from {file}")
        except BackendError:
            raise
        except Exception as error:  # torch and the library raise what they like
            raise BackendError(f"TensorRT cannot load {file}: {error}") from error

    @property
    def name(self) -> str:
        return engine_name(self._precision)

    @property
    def captured(self) -> dict[int, bool]:
        """Whether each batch size made ready so far replays a CUDA graph of ours."""
        return {} if self._plan is None else self._plan.captured

    def run(self, rows: Rows) -> dict[str, NDArray[Any]]:
        if self._plan is None:
            raise BackendError("this TensorRT engine was closed; load it again")
        try:
            return self._plan.run(rows)
        except OutOfMemoryError:
            raise
        except Exception as error:
            raise BackendError(f"TensorRT failed on {self._spec.file}: {error}") from error

    def release(self) -> bool:
        if self._plan is not None:
            self._plan.release()
        return True

    def close(self) -> None:
        if self._plan is not None:
            self._plan.close()
        self._plan = None


def engine_name(precision: Precision) -> str:
    """Library, version and precision. Raises: BackendError when no library is installed."""
    return f"{library_name(find_library())} {precision}"


def build_plan(
    file: Path,
    spec: GraphSpec,
    precision: Precision,
    rungs: Sequence[int],
    sizes: Sequence[Size],
    store: PlanStore | None,
) -> bytes:
    """Compile a graph for the GPU of this machine; what the builder learns is kept for the next graph."""
    timings = None if store is None else store.of_every_graph()
    known = None if timings is None else timings.load("timings")
    network = Network(find_library(), file, spec, precision)
    built = network.build(rungs, sizes, for_this_gpu=True, timings=known or b"")
    if timings is not None and built.timings:
        timings.save("timings", built.timings)
    return built.plan
