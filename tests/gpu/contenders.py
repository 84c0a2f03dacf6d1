"""What the bench times: our engines, and the stock network of diffusers, on graphs of one architecture."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distill_jobs.onnx_export import write_graph
from engines.backends.base import EngineBackend, Precision
from engines.backends.load import BUILT, BackendName, key_of, load_graph
from engines.bundle import file_records
from engines.cache import EngineKey
from engines.manifest import GraphSpec, Parity, TensorSpec
from tests.gpu.architectures import Architecture, Graph

Call = Callable[[], None]
Ready = Callable[[int], Call]
"""Gets a contender ready for a batch size, and gives its call."""


def export(architecture: Architecture, model: str, graph: Graph, folder: Path) -> tuple[Path, GraphSpec]:
    """A graph as bundles hold it, written where it is not there yet; and its manifest entry."""
    module, side = getattr(architecture, graph), architecture.side
    conditions = (architecture.packing.rows,) if graph == "step" else ()
    inputs, outputs = module.inputs(side, side, *conditions), module.outputs(side, side)
    file = folder / f"{model}-{graph}" / "graph.onnx"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            written = Path(unfinished) / file.parent.name / file.name
            written.parent.mkdir()
            example = [torch.from_numpy(array) for array in random_inputs(inputs, 2).values()]
            write_graph(module.requires_grad_(False), example, inputs, outputs, written)
            written.parent.rename(file.parent)
    parity = Parity(reference="none", max_abs_error=0, mean_abs_error=0, rows=0)
    lowered = {"float16": parity}  # or it would not run in it; whether it overflows is for ``python -m engines``
    return file, GraphSpec(file=file.name, inputs=inputs, outputs=outputs, parity=parity, lowered=lowered)


def random_inputs(specs: tuple[TensorSpec, ...], rows: int) -> dict[str, NDArray[Any]]:
    """Standard normal rows, and times within the schedule."""
    rng = np.random.default_rng(0)
    drawn = {spec.name: rng.standard_normal((rows, *spec.shape[1:]), dtype=np.float32) for spec in specs}
    return {name: np.abs(array) * 100 if name == "timestep" else array for name, array in drawn.items()}


def engine_contenders(
    backends: Mapping[BackendName, Precision],
    file: Path,
    spec: GraphSpec,
    rungs: Sequence[int],
    engines: dict[str, str],
    stack: ExitStack,
    work: Path | None = None,
) -> dict[str, Callable[[], Ready]]:
    """Engines as a server has them: a whole call each.

    engines: gets the name of each that is loaded; stack: closes them; work: where what they build is kept.
    """

    def load(backend: BackendName, precision: Precision) -> Ready:
        kept = None if work is None else kept_in(work, file, spec, backend, precision)
        engine = load_graph(backend, file, spec, precision=precision, kept=kept, rungs=rungs)
        stack.callback(engine.close)
        engines[f"{backend} {precision}"] = engine.name
        return partial(engine_call, engine, spec)

    return {f"{backend} {precision}": partial(load, backend, precision) for backend, precision in backends.items()}


def kept_in(
    work: Path, file: Path, spec: GraphSpec, backend: BackendName, precision: Precision
) -> tuple[Path, EngineKey] | None:
    """Where a backend that builds keeps what it made of the graph; None of the others."""
    if backend not in BUILT:
        return None
    hashes = "".join(record.sha256 for record in file_records(file.parent).values())
    return work, key_of(hashlib.sha256(hashes.encode()).hexdigest(), spec, backend, precision)


def engine_call(engine: EngineBackend, spec: GraphSpec, rung: int) -> Call:
    """A whole call, as a server makes it."""
    inputs = random_inputs(spec.inputs, rung)

    def call() -> None:
        engine.run(inputs)

    return call


def diffusers_contender(
    architecture: Architecture, graph: Graph, device: str, precision: Precision, compiled: bool = False
) -> dict[str, Callable[[], Ready]]:
    """The stock network alone, in ``precision``, its inputs on the device already.

    compiled: for one batch size at a time.
    """
    dtype: torch.dtype = getattr(torch, precision)

    def load() -> Ready:
        network = deepcopy(architecture.network(graph)).to(device, dtype, memory_format=torch.channels_last)
        return partial(compiled_call if compiled else call_of, network)

    def call_of(network: Any, rung: int) -> Call:
        latent, arguments = diffusers_inputs(architecture, graph, rung, device, dtype)

        def call() -> None:
            with torch.inference_mode():
                network(latent, **arguments)
            if device == "cuda":
                torch.cuda.synchronize()

        return call

    def compiled_call(network: nn.Module, rung: int) -> Call:
        torch._dynamo.reset()  # a second size would be compiled for any size
        return call_of(torch.compile(network, mode="max-autotune", dynamic=False), rung)

    return {f"diffusers {'compiled' if compiled else 'eager'} {precision}": load}


def diffusers_inputs(
    architecture: Architecture, graph: Graph, rung: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Any]]:
    """Latents, and what else the network takes, on the device."""
    latent = torch.randn(rung, 4, architecture.side, architecture.side, device=device, dtype=dtype)
    if graph != "step":
        return latent, {}
    told = architecture.packing.unpack(torch.randn(rung, architecture.packing.rows, architecture.packing.width))
    told = told.to(device)
    arguments: dict[str, Any] = {
        "timestep": torch.full((rung,), 500, device=device),
        "encoder_hidden_states": told.tokens.to(dtype),
        "timestep_cond": torch.randn(rung, 256, device=device, dtype=dtype),
    }
    if told.pooled is not None and told.time_ids is not None:
        arguments["added_cond_kwargs"] = {
            "text_embeds": told.pooled.to(dtype),
            "time_ids": told.time_ids.to(dtype),
        }
    return latent, arguments
