"""A torch module to one clean ONNX file, and the proof that the file computes what the module does."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distill_jobs.errors import JobError
from distill_jobs.half_weights import keep_in_float16
from distill_jobs.lowered import WatchedProducts
from distill_jobs.onnx_rewrites import (
    with_means_as_products,
    with_scales_added,
    without_einsums,
    without_guards,
    without_notes,
)
from distill_jobs.sections import StoredWeights
from distill_jobs.traces import program_of
from engines.bundle import INLINE_LIMIT_BYTES
from engines.manifest import FREE, Parity, TensorSpec

OPSET = 21


class ExportError(JobError):
    """A model cannot become a graph, or the graph does not compute what the model does."""


def write_graph(
    module: nn.Module,
    example: Sequence[Tensor],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    path: Path,
    weights: StoredWeights = "float32",
) -> None:
    """Trace ``module`` with all that ``inputs`` leave free, the batch first of all, and write it to ``path``.

    example: one tensor an input, batch at least 2 (a batch of 1 would be taken for a constant). weights: what the
    file keeps those in that float16 has exactly; the arithmetic is float32.
    """
    if any(len(tensor) < 2 for tensor in example):
        raise ValueError("trace with a batch of at least 2")
    program = _optimised(module.eval(), example, inputs, outputs)
    if weights == "float16":
        keep_in_float16(program.model.graph)
    tensors = [value.const_value for value in program.model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    if size <= INLINE_LIMIT_BYTES:
        model = program.model_proto
    else:  # written from torch's own memory: the message would hold each weight a second time
        program.save(path, external_data=True)
        model = onnx.load(str(path), load_external_data=False)
    model = without_notes(with_means_as_products(model))
    onnx.save_model(with_scales_added(without_einsums(without_guards(model))), str(path))


def _optimised(
    module: nn.Module, example: Sequence[Tensor], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> torch.onnx.ONNXProgram:
    """``module`` as a program, constants folded; traced where no module of its architecture was."""
    axis = torch.export.Dim.AUTO  # diffusers branches on batch >= 64 (contiguity only), which a named Dim rejects
    free = tuple({i: axis for i, length in enumerate(spec.shape) if length == FREE} for spec in inputs)
    kinds = {parameter.kind for parameter in inspect.signature(module.forward).parameters.values()}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it lists optional packages we do not use

    def trace() -> torch.onnx.ONNXProgram:
        program = torch.onnx.export(
            module,
            tuple(example),
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in outputs],
            dynamic_shapes=(free,) if inspect.Parameter.VAR_POSITIONAL in kinds else free,
            optimize=False,
            verbose=False,
        )
        assert program is not None
        return program

    asked = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in example], inputs, outputs
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", (UserWarning, FutureWarning))  # the exporter's own, about its internals
        program = program_of(module, asked, trace)
        program.optimize()
    return program


def reference_outputs(module: nn.Module, rows: Sequence[Tensor], name: str) -> list[NDArray[np.float64]]:
    """What torch computes, one array an output. Raises: ExportError when it, or any product, is not finite."""
    with torch.no_grad(), WatchedProducts() as products:
        result = module.eval()(*rows)
    outputs = [t.numpy().astype(np.float64) for t in (result if isinstance(result, tuple) else (result,))]
    if not products.finite or not all(np.isfinite(output).all() for output in outputs):
        raise ExportError(f"{name}: the model gives NaN or infinity; it was not exported")
    return outputs


def check_parity(
    expected: Sequence[NDArray[np.float64]],
    path: Path,
    rows: Sequence[Tensor],
    batches: Sequence[int],
    limit: float,
) -> Parity:
    """Run ``rows`` through the file in ``batches`` and compare with the reference outputs.

    rows: one tensor an input, all of len sum(batches). limit: largest absolute difference allowed, in units
    of the outputs. Raises: ExportError when an output differs by more.
    """
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    pieces = []
    for first, size in zip(np.cumsum([0, *batches]), batches, strict=False):
        feed = {name: t[first : first + size].numpy() for name, t in zip(names, rows, strict=True)}
        pieces.append(session.run(None, feed))
    differences = [
        np.abs(np.concatenate(got).astype(np.float64) - want)
        for got, want in zip(zip(*pieces, strict=True), expected, strict=True)
    ]
    largest = max(float(d.max()) for d in differences)
    if not largest <= limit:
        raise ExportError(
            f"{path.stem}: the exported graph differs from torch by {largest:.2g}, more than {limit:.2g}"
        )
    return Parity(
        reference=f"torch {torch.__version__.split('+')[0]} float32",
        max_abs_error=largest,
        mean_abs_error=float(np.mean([d.mean() for d in differences])),
        rows=sum(batches),
    )
