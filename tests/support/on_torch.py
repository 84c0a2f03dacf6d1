"""What every graph has to be to torch, on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from engines.backends.onnxruntime import OnnxRuntimeBackend
from engines.backends.torch import OnnxModule, TorchBackend
from engines.backends.torch_cuda import TorchCudaBackend
from engines.manifest import GraphSpec

Rows = dict[str, NDArray[Any]]
RUNGS = (1, 2)


def check_on_torch(file: Path, spec: GraphSpec, rows: Rows) -> None:
    """Both torch backends compute what ONNX Runtime does, to 1e-5 of the largest value; no value is read back."""
    expected = OnnxRuntimeBackend(file, spec).run(rows)
    for engine in (TorchBackend(file, spec), TorchCudaBackend(file, spec, rungs=RUNGS, device="cpu")):
        got = engine.run(rows)
        for name, array in expected.items():
            bound = 1 if array.dtype == np.uint8 else 1e-5 * max(1, np.abs(array).max())
            assert got[name].dtype == array.dtype
            assert np.abs(got[name].astype(np.float64) - array).max() <= bound, (file.name, engine.name, name)
    for name, tensor in run_on_meta(onnx.load(str(file)), rows).items():
        assert (tuple(tensor.shape), tensor.device.type) == (expected[name].shape, "meta")


def run_on_meta(model: onnx.ModelProto, rows: Rows) -> dict[str, torch.Tensor]:
    """On a device without values: reading one, or mixing it with the CPU, raises."""
    inputs = {name: torch.from_numpy(array).to("meta") for name, array in rows.items()}
    outputs: dict[str, torch.Tensor] = OnnxModule(model, "meta")(inputs)
    return outputs
