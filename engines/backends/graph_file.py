"""An ONNX graph from its file, and its weights one at a time: a large network's fill the memory once at most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray

from engines.errors import BackendError


def read_graph(file: Path) -> onnx.ModelProto:
    """The graph without the weights beside it. Raises: BackendError."""
    try:
        return onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf raises its own, undocumented types
        raise BackendError(f"{file} is not an ONNX graph ({type(error).__name__})") from error


def read_constant(constant: onnx.TensorProto, folder: Path) -> NDArray[Any]:
    """Its values, not to be written to. folder: of the graph's file. Raises: BackendError where they are not."""
    try:
        return onnx.numpy_helper.to_array(constant, str(folder))
    except Exception as error:  # onnx's own types, and those of what it calls
        raise BackendError(f"{constant.name} cannot be read from {folder}: {error}") from error
