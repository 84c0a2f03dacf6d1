"""What every graph has to be to torch and its compiler, on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from engines.backends.base import EngineBackend, Precision
from engines.backends.cuda_rows import CudaRows
from engines.backends.onnxruntime import OnnxRuntimeBackend
from engines.backends.torch import TorchBackend
from engines.backends.torch_cuda import TorchCudaBackend
from engines.backends.torch_fused import fused_module
from engines.backends.torch_inductor import Program, TorchInductorBackend, trace
from engines.manifest import GraphSpec

Rows = dict[str, NDArray[Any]]
RUNGS = (1, 2)
BOUNDS: dict[Precision, float] = {"float32": 1e-5, "bfloat16": 0.03, "float16": 0.004}
"""Of the largest value: how far a torch backend may be from ONNX Runtime in float32."""


def check_on_torch(file: Path, spec: GraphSpec, rows: Rows) -> None:
    """All torch backends compute what ONNX Runtime does, in every precision; no value is read back.

    What the compiler is given is run by its operators here: compiling takes a minute of a network.
    """
    expected = OnnxRuntimeBackend(file, spec).run(rows)
    check_close(TorchBackend(file, spec), rows, expected, BOUNDS["float32"])
    for precision, bound in BOUNDS.items():
        engine = TorchCudaBackend(file, spec, precision=precision, rungs=RUNGS, device="cpu")
        check_close(engine, rows, expected, bound)
        for name, tensor in run_on_meta(onnx.load(str(file)), rows, precision).items():
            assert (tuple(tensor.shape), tensor.device.type) == (expected[name].shape, "meta")
        check_close(_Traced(file, spec, precision), rows, expected, bound)


def check_close(engine: EngineBackend, rows: Rows, expected: Rows, bound: float) -> None:
    """bound: of the largest value of each output; 8-bit images may always differ by one level."""
    got = engine.run(rows)
    for name, array in expected.items():
        limit = bound * max(1, np.abs(array).max())
        assert got[name].dtype == array.dtype
        difference = np.abs(got[name].astype(np.float64) - array).max()
        assert difference <= (max(1, limit) if array.dtype == np.uint8 else limit), (engine.name, name)


class _Traced(TorchInductorBackend):
    """Its graphs as they are before they are compiled."""

    def __init__(self, file: Path, spec: GraphSpec, precision: Precision) -> None:
        super().__init__(file, spec, precision=precision, rungs=(3,), device="cpu")

    def _obtain(self, rows: CudaRows) -> Program:
        assert self._module is not None
        graph, taken, constants = trace(self._module, rows.inputs, tuple(rows.outputs))
        return lambda values: graph(*({**constants, **values}[name] for name in taken))


def run_on_meta(model: onnx.ModelProto, rows: Rows, precision: Precision = "float32") -> dict[str, torch.Tensor]:
    """As on a GPU, on a device without values: reading one, or mixing it with the CPU, raises."""
    inputs = {name: torch.from_numpy(array).to("meta") for name, array in rows.items()}
    outputs: dict[str, torch.Tensor] = fused_module(model, precision, "meta")(inputs)
    return outputs
