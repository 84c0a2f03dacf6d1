"""Products in 16 bits, and nothing else."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from engines.backends.lowering import lower_products
from engines.backends.torch import OnnxModule
from engines.manifest import CLEAN_ESTIMATE, COEFFICIENTS, GUIDANCE, NEXT_LATENT, TIMESTEP, Lowered
from tests.support.step_rows import random_rows

PRODUCTS = {"Conv", "Gemm", "MatMul"}
TYPES: dict[Lowered, int] = {"bfloat16": onnx.TensorProto.BFLOAT16, "float16": onnx.TensorProto.FLOAT16}
in_16_bits = pytest.mark.parametrize("dtype", TYPES)


@pytest.fixture(scope="module")
def model(unet_file: Path) -> onnx.ModelProto:
    return onnx.load(str(unet_file))


def run(model: onnx.ModelProto, rows: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    with torch.inference_mode():
        outputs = OnnxModule(model)({name: torch.from_numpy(array) for name, array in rows.items()})
    return {name: tensor.numpy() for name, tensor in outputs.items()}


def lowered_copy(model: onnx.ModelProto, dtype: Lowered) -> onnx.ModelProto:
    lowered = deepcopy(model)
    lower_products(lowered, dtype)
    return lowered


@in_16_bits
def test_only_products_are_lowered(model: onnx.ModelProto, dtype: Lowered) -> None:
    lowered = lowered_copy(model, dtype)
    onnx.checker.check_model(lowered, full_check=True)
    types = {
        info.name: info.type.tensor_type.elem_type
        for info in onnx.shape_inference.infer_shapes(lowered).graph.value_info
    }
    for node in lowered.graph.node:
        if node.op_type == "Cast":
            continue
        found = {types[name] for name in node.output if name in types} & {1, *TYPES.values()}
        assert found <= {TYPES[dtype] if node.op_type in PRODUCTS else onnx.TensorProto.FLOAT}, node
    assert len(PRODUCTS & {node.op_type for node in lowered.graph.node}) >= 2
    assert lowered.graph.input == model.graph.input
    assert lowered.graph.output == model.graph.output
    assert lowered.graph.initializer == model.graph.initializer


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.03), ("float16", 0.004)])
def test_the_step_stays_close_over_the_whole_range_of_w(
    model: onnx.ModelProto, dtype: Lowered, bound: float
) -> None:
    """At w·1000 a step of bfloat16 is 64, of float16 8: sinusoids of a lowered w would be another model's."""
    rows = random_rows(8, seed=9)
    rows[GUIDANCE][:] = (0, 0.5, 0.5, 2, 4, 7.5, 14, 14)
    rows[TIMESTEP][:] = (0, 1, 999, 500, 250, 125, 1, 999)
    rows[COEFFICIENTS][:] = (0, 1, 3e38, 0, 1, 0, 0, 0, 0)
    expected, got = run(model, rows), run(lowered_copy(model, dtype), rows)
    for name in (NEXT_LATENT, CLEAN_ESTIMATE):
        error = np.abs(got[name] - expected[name]).max(axis=(1, 2, 3)) / np.abs(expected[name]).max(axis=(1, 2, 3))
        assert (error > 0).any(), "nothing was lowered"
        assert (error < bound).all(), (name, error)


@in_16_bits
def test_the_update_stays_float32(model: onnx.ModelProto, dtype: Lowered) -> None:
    """With b = c = d = 0 the next latent is a·latent, which 16 bits would round."""
    rows = random_rows(4, seed=10)
    rows[COEFFICIENTS][:] = (0, 0, 3e38, 1.001, 0, 0, 0, 0, 0)
    rows["mask"][:] = 1
    lowered = run(lowered_copy(model, dtype), rows)
    np.testing.assert_array_equal(lowered[NEXT_LATENT], rows["latent"] * np.float32(1.001))
