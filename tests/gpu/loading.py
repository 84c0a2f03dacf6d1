"""A graph's file on any backend, without a bundle and without a cache; and whether there is a GPU for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from engines.backends.base import EngineBackend, Precision
from engines.backends.cuda import find_device
from engines.backends.load import BackendName
from engines.backends.onnxruntime import OnnxRuntimeBackend
from engines.backends.tensorrt_build import check_target, find_library
from engines.errors import BackendError
from engines.manifest import GraphSpec


def load_file(
    name: BackendName, file: Path, spec: GraphSpec, precision: Precision, rungs: Sequence[int]
) -> EngineBackend:
    """tensorrt, torch-cuda, or for any other name the reference on the CPU."""
    if name == "tensorrt":
        from engines.backends.tensorrt import TensorRtBackend

        return TensorRtBackend(file, spec, precision=precision, rungs=rungs)
    if name == "torch-cuda":
        from engines.backends.torch_cuda import TorchCudaBackend

        return TorchCudaBackend(file, spec, precision=precision, rungs=rungs)
    return OnnxRuntimeBackend(file, spec)


def skip_unless_possible(name: BackendName) -> None:
    """Skip with the reason that a user would be given."""
    try:
        device = find_device()
        if name == "tensorrt":
            check_target(find_library(), device)
    except BackendError as reason:
        pytest.skip(str(reason))
