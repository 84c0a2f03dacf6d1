"""A TensorRT plan at work on the current CUDA device: a context a batch and image size, scratch memory shared."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Self

import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.backends.base import Rows
from engines.backends.cuda import says_out_of_memory
from engines.backends.cuda_rows import CudaRows, Enqueue, Ladder
from engines.backends.plan_store import PlanStore
from engines.backends.tensorrt_build import is_rtx, logger
from engines.errors import BackendError, OutOfMemoryError
from engines.manifest import GraphSpec, Size


class LoadedPlan:
    """The engine of a plan, whose profiles are ``rungs`` in this order, for each of ``sizes`` in turn.

    tensorrt_rtx compiles kernels for the GPU when a context is made, which ``store`` keeps, and captures CUDA
    graphs itself; for tensorrt the ladder does. Scratch memory is the largest profile's, as the library demands for
    all of them. Raises: OutOfMemoryError where there is none.
    """

    def __init__(
        self,
        trt: ModuleType,
        runtime: Any,
        engine: Any,
        spec: GraphSpec,
        rungs: Sequence[int],
        sizes: Sequence[Size],
        store: PlanStore | None,
    ) -> None:
        self._trt = trt
        self._runtime = runtime  # an engine needs it, and does not hold it
        self._engine = engine
        self._spec = spec
        self._rungs = tuple(rungs)
        size = max(engine.device_memory_size_v2, 1)
        try:
            self._scratch: Tensor | None = torch.empty(size, dtype=torch.uint8, device="cuda")
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"the plan of {spec.file} for {max(rungs)} rows takes {size / 1e6:.0f} MB beside its weights, "
                f"which do not fit: give smaller --rungs, or a lower --precision ({error})"
            ) from error
        self._kernels = _Kernels(engine, store) if is_rtx(trt) else None
        self._ladder = Ladder(spec, rungs, self._make, capture=self._kernels is None, sizes=sizes)

    @classmethod
    def open(
        cls,
        trt: ModuleType,
        plan: bytes,
        spec: GraphSpec,
        rungs: Sequence[int],
        sizes: Sequence[Size],
        store: PlanStore | None,
    ) -> Self | None:
        """Load a plan, or give None where the library does not take it. Raises: OutOfMemoryError."""
        log = logger(trt)
        log.errors.clear()
        runtime = trt.Runtime(log)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None and says_out_of_memory(log.reasons()):
            raise OutOfMemoryError(
                f"the weights of {spec.file} do not fit into the GPU's memory: free some, or give a lower "
                f"--precision ({log.reasons()})"
            )
        return None if engine is None else cls(trt, runtime, engine, spec, rungs, sizes, store)

    @property
    def captured(self) -> dict[int, bool]:
        """Whether each batch size made ready so far replays a CUDA graph of ours."""
        return self._ladder.captured

    def run(self, rows: Rows) -> dict[str, NDArray[Any]]:
        """All outputs of any number of rows."""
        return self._ladder.run(rows)

    def release(self) -> None:
        """Free the contexts and what calls hold; the next call of each batch size makes its own again."""
        self._ladder.release()

    def close(self) -> None:
        """Free everything, contexts before the engine they belong to."""
        self._ladder.release()
        self._kernels = self._engine = self._runtime = None
        self._scratch = None  # now: the ladder refers back to this plan, so both wait for the garbage collector

    def _make(self, rows: CudaRows) -> Enqueue:
        assert self._ladder.stream is not None
        assert self._scratch is not None
        logger(self._trt).errors.clear()
        context, stream = self._context(), self._ladder.stream.cuda_stream
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        profile = rows.size * len(self._rungs) + self._rungs.index(rows.rung)
        taken = [context.set_optimization_profile_async(profile, stream)]
        taken += [context.set_input_shape(name, tuple(tensor.shape)) for name, tensor in rows.inputs.items()]
        everything = {**rows.inputs, **rows.outputs}
        taken += [context.set_tensor_address(name, tensor.data_ptr()) for name, tensor in everything.items()]
        if not all(taken):
            raise BackendError(
                f"the engine takes no {rows.rung} rows of these shapes: {logger(self._trt).reasons()}"
            )

        def enqueue() -> None:
            if not context.execute_async_v3(stream):
                raise BackendError(f"the engine does not run {rows.rung} rows: {logger(self._trt).reasons()}")

        if self._kernels is not None:
            enqueue()
            self._ladder.stream.synchronize()
            self._kernels.keep()
        return enqueue

    def _context(self) -> Any:
        trt, config = self._trt, self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._kernels is not None:
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            config.dynamic_shapes_kernel_specialization_strategy = (
                trt.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            config.set_runtime_cache(self._kernels.cache)
        context = self._engine.create_execution_context(config)
        if context is None:
            raise BackendError(f"the engine gives no execution context: {logger(trt).reasons()}")
        return context


class _Kernels:
    """What tensorrt_rtx compiled for this GPU, kept beside the plan for the next start.

    cache: must outlive every context that uses it, or the process ends.
    """

    def __init__(self, engine: Any, store: PlanStore | None) -> None:
        self._store = store
        self._kept = None if store is None else store.load("kernels")
        self.cache = engine.create_runtime_config().create_runtime_cache()
        if self._kept is not None:
            self.cache.deserialize(self._kept)

    def keep(self) -> None:
        """Save what is new."""
        if self._store is None:
            return
        kernels = bytes(self.cache.serialize())
        if kernels != self._kept:
            self._store.save("kernels", kernels)
            self._kept = kernels
