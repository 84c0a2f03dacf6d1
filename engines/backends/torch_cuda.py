"""torch on an NVIDIA GPU: the bundle's ONNX graphs with torch operators, one CUDA graph a rung.

What runs where TensorRT is not installed, or makes nothing for the GPU: nothing is built, so it starts at once.
Attention, linear layers and activations are torch's own (``engines.backends.torch_fused``). Weights lie with
channels last, the layout of the tensor cores' convolutions; bfloat16 and float16 lower products alone
(``engines.backends.lowering``), float16's summed in float32; float32 is without TF32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from engines.backends.base import RUNGS, OfGraph, Precision, Rows
from engines.backends.cuda import find_device
from engines.backends.cuda_rows import CudaRows, Enqueue, Ladder
from engines.backends.graph_file import read_graph
from engines.backends.torch import OnnxModule
from engines.backends.torch_fused import fused_module
from engines.errors import BackendError, OutOfMemoryError
from engines.manifest import GraphSpec, Size


class TorchCudaBackend(OfGraph):
    """One graph on the current CUDA device.

    precision: of the network body. rungs: batch sizes that get a CUDA graph; a batch between two is filled up, one
    beyond the largest runs in pieces. sizes: of images, each with graphs of its own, where the graph takes several.
    device: cuda, or cpu to rehearse.
    Raises: BackendError when there is no GPU or no room on it, or the graph cannot be read or holds an operator not
    known here.
    """

    def __init__(
        self,
        file: Path,
        spec: GraphSpec,
        *,
        precision: Precision = "float32",
        rungs: Sequence[int] = RUNGS,
        sizes: Sequence[Size] = (),
        device: str = "cuda",
    ) -> None:
        if device == "cuda":
            find_device()
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        self._spec = spec
        self._precision = precision
        try:
            self._module: OnnxModule | None = fused_module(read_graph(file), precision, device, file.parent)
            if device == "cuda":
                torch.cuda.synchronize()  # weights are laid out on another stream than the ladder's
        except RuntimeError as error:
            raise BackendError(f"torch cannot load {file}: {error}") from error
        self._ladder = Ladder(spec, sorted(rungs), self._make, capture=True, sizes=sizes, device=device)

    @property
    def name(self) -> str:
        return engine_name(self._precision)

    @property
    def captured(self) -> dict[int, bool]:
        """Whether each batch size made ready so far replays a CUDA graph."""
        return self._ladder.captured

    def run(self, rows: Rows) -> dict[str, NDArray[Any]]:
        if self._module is None:
            raise BackendError("this torch engine was closed; load it again")
        try:
            with torch.inference_mode():
                return self._ladder.run(rows)
        except OutOfMemoryError:
            raise
        except (BackendError, RuntimeError, IndexError, KeyError) as error:
            raise BackendError(f"torch failed on {self._spec.file}: {error}") from error

    def release(self) -> bool:
        self._ladder.release()
        return True

    def close(self) -> None:
        if self._module is not None:
            self._ladder.release()
        self._module = None

    def _make(self, rows: CudaRows) -> Enqueue:
        def enqueue() -> None:
            assert self._module is not None
            outputs = self._module(rows.inputs)
            for name, tensor in rows.outputs.items():
                tensor.copy_(outputs[name])

        return enqueue


def engine_name(precision: Precision) -> str:
    """Backend, version (with the CUDA that it was built for) and precision."""
    return f"torch-cuda {torch.__version__} {precision}"
