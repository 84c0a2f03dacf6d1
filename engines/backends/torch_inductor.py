"""torch's own compiler on an NVIDIA GPU: the graphs of ``torch-cuda``, with what follows each other in one kernel.

``torch-cuda`` writes and reads the whole image between normalisation, activation, cast and sum; compiled, they are
one pass over it. Products and attention stay the libraries' own. Each batch and image size is traced with fixed
shapes and compiled by itself; what comes of it is a plan that holds no weights, so all of them read the same ones.

A plan is code, and so is what the compiler leaves in its own folder, for whose contents nobody vouches: that folder
is this process' alone, and goes with it. Source: ``torch._inductor.standalone_compile``, torch 2.11 to 2.13.
"""

from __future__ import annotations

import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import CompiledArtifact, standalone_compile  # type: ignore[attr-defined]
from torch._inductor import config as inductor_config

from engines.backends.base import RUNGS, Precision
from engines.backends.cuda import says_out_of_memory
from engines.backends.cuda_rows import CudaRows, Enqueue
from engines.backends.plan_store import PlanStore
from engines.backends.torch import FixedGraph, OnnxModule
from engines.backends.torch_cuda import TorchCudaBackend
from engines.errors import BackendError
from engines.machine import limited_threads
from engines.manifest import GraphSpec, Size

Program = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]
"""A compiled graph: from weights and inputs, by name, to its outputs in the manifest's order."""


class TorchInductorBackend(TorchCudaBackend):
    """As TorchCudaBackend; a batch size is compiled when it first comes, which takes minutes of a large network.

    store: where what was compiled is kept, each batch and image size by itself, or None to compile it every time.
    Raises: as TorchCudaBackend does.
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
        device: str = "cuda",
    ) -> None:
        super().__init__(file, spec, precision=precision, rungs=rungs, sizes=sizes, device=device)
        _share_cores()
        self._device = device
        self._store = store
        self._programs: dict[tuple[int, int], Program] = {}

    @property
    def name(self) -> str:
        return engine_name(self._precision)

    def close(self) -> None:
        super().close()
        self._programs.clear()

    def _make(self, rows: CudaRows) -> Enqueue:
        assert self._module is not None
        program, values = self._program(rows), {**self._module.weights, **rows.inputs}

        def enqueue() -> None:
            for tensor, made in zip(rows.outputs.values(), program(values), strict=True):
                tensor.copy_(made)

        return enqueue

    def _program(self, rows: CudaRows) -> Program:
        """Kept here, too: a ladder makes batch sizes ready more than once."""
        key = rows.rung, rows.size
        if key not in self._programs:
            self._programs[key] = self._obtain(rows)
        return self._programs[key]

    def _obtain(self, rows: CudaRows) -> Program:
        def build() -> bytes:
            assert self._module is not None
            return compile_program(self._module, rows.inputs, tuple(rows.outputs))

        def load(plan: bytes) -> Program | None:
            return load_program(plan, self._device)

        try:
            if self._store is not None:
                return self._store.of(rows.rung, rows.size).obtain(load, build)
            program = load(build())
        except BackendError:
            raise
        except Exception as error:  # the compiler raises what it likes, compilers' whole output in it
            if says_out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise BackendError(
                f"cannot make {rows.rung} rows ready ({reason}); --backend torch-cuda runs them uncompiled"
            ) from error
        if program is None:
            raise BackendError(f"does not load what it has just compiled for {rows.rung} rows")
        return program


def engine_name(precision: Precision) -> str:
    """Backend, version (with the CUDA that it was built for) and precision."""
    return f"torch-inductor {torch.__version__} {precision}"


def compile_program(module: OnnxModule, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> bytes:
    """The module as code for inputs of just these shapes, with the names of what it takes.

    outputs: their names, in the order wanted. Raises: BackendError where torch keeps nothing it compiled; whatever
    the compiler does.
    """
    if inductor_config.force_disable_caches or not (
        inductor_config.fx_graph_cache and functorch_config.enable_autograd_cache
    ):
        raise BackendError(
            "torch's caches are switched off, from which what it compiled is taken: unset "
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES, TORCHINDUCTOR_FX_GRAPH_CACHE and TORCHINDUCTOR_AUTOGRAD_CACHE, "
            "or use --backend torch-cuda"
        )
    graph, taken, constants = trace(module, inputs, outputs)
    without_values = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    with _as_torch_likes_it(), tempfile.TemporaryDirectory(dir=_workshop().name) as folder:
        file = Path(folder, "program")
        standalone_compile(graph, without_values).save(path=str(file))
        code = file.read_bytes()
    written = io.BytesIO()
    torch.save({"taken": taken, "constants": constants, "code": code}, written)
    return written.getvalue()


def load_program(plan: bytes, device: str) -> Program | None:
    """What ``compile_program`` gave, ready to run; None where this torch does not take it.

    plan: from a trusted place, for it is run. device: where its constants are to lie.
    Raises: OSError where there is no room to unpack it, for which the plan is not to blame; torch's error of a
    device that is full.
    """
    with tempfile.TemporaryDirectory(dir=_workshop().name) as folder:
        try:
            read = torch.load(io.BytesIO(plan), map_location=device, weights_only=True)
            file = Path(folder, "program")
            file.write_bytes(read["code"])
            compiled = CompiledArtifact.load(path=str(file))
        except OSError:
            raise
        except Exception as error:  # asserts, and pickle's errors
            if says_out_of_memory(error):
                raise
            return None
    taken, constants = read["taken"], read["constants"]

    def program(values: Mapping[str, Tensor]) -> Sequence[Tensor]:
        made: Sequence[Tensor] = compiled(*(constants.get(name, values.get(name)) for name in taken))
        return made

    return program


class Traced(NamedTuple):
    """A graph's operators for fixed shapes, as a function of ``taken``: names of weights, constants and inputs."""

    graph: torch.fx.GraphModule
    taken: list[str]
    constants: dict[str, Tensor]


def trace(module: OnnxModule, inputs: Mapping[str, Tensor], outputs: Sequence[str]) -> Traced:
    """The module for inputs of just these shapes, whose values do not count. outputs: in the order wanted."""
    with _as_torch_likes_it():
        examples = {name: torch.empty_like(tensor) for name, tensor in inputs.items()}
        fixed = module.fixed(examples)
        values = {**module.weights, **fixed.constants, **examples}
        graph = torch.export.export(_Fixed(fixed, outputs), (values,), strict=False).graph_module
    graph.graph.eliminate_dead_code()
    taken = []
    for node, name in zip(graph.graph.find_nodes(op="placeholder"), values, strict=True):
        if node.users:
            taken.append(name)
        else:
            graph.graph.erase_node(node)
    graph.recompile()
    return Traced(graph, taken, {name: tensor for name, tensor in fixed.constants.items() if name in taken})


class _Fixed(torch.nn.Module):
    """A graph of fixed shapes, its weights inputs like all others, its outputs in a given order."""

    def __init__(self, graph: FixedGraph, outputs: Sequence[str]) -> None:
        super().__init__()
        self._graph = graph
        self._outputs = outputs

    def forward(self, values: dict[str, Tensor]) -> tuple[Tensor, ...]:
        made = self._graph.run(values)
        given = {id(tensor) for tensor in values.values()}  # a graph of these alone would be nothing to compile
        return tuple(made[name].clone() if id(made[name]) in given else made[name] for name in self._outputs)


@contextmanager
def _as_torch_likes_it() -> Iterator[None]:
    """Outside of inference mode, whose tensors it does not trace, and without its warnings about its own code."""
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def _share_cores() -> None:
    """Let no more processes compile at once than a CPU limit pays for, which torch does not see."""
    if (threads := limited_threads()) and "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        inductor_config.compile_threads = threads


@cache
def _workshop() -> tempfile.TemporaryDirectory[str]:
    """The folder where the compiler leaves files, of this process alone; it ends with it.

    The environment is where torch looks for it, and nowhere else.
    """
    folder = tempfile.TemporaryDirectory(prefix="halfstep-inductor-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
    os.environ.pop("TRITON_CACHE_DIR", None)  # or its kernels lay elsewhere
    return folder
