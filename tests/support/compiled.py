"""What every graph has to be once TensorRT has parsed it, on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import onnx

from engines.backends.base import Precision
from engines.backends.tensorrt_build import Network
from engines.manifest import GraphSpec, Size

RUNGS = (1, 4)
PRECISIONS: dict[Precision, str] = {"float32": "FLOAT", "bfloat16": "BF16", "float16": "HALF"}
OPERATORS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
PRODUCTS = {"CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY"}


def check_compiles(
    trt: ModuleType, file: Path, spec: GraphSpec, precision: Precision, sizes: Sequence[Size] = ()
) -> int:
    """The parsed network takes and gives what the manifest says, multiplies in the precision, and compiles.

    Gives how many products it has.
    """
    network = Network(trt, file, spec, precision)
    for found, described in ((network.inputs(), spec.inputs), (network.outputs(), spec.outputs)):
        assert {tensor.name: tensor.dtype for tensor in found} == {t.name: t.dtype for t in described}
        assert {tensor.name: tensor.shape for tensor in found} == {t.name: t.shape for t in described}
    layers = [network.definition.get_layer(i) for i in range(network.definition.num_layers)]
    products = [layer.get_output(0).dtype.name for layer in layers if layer.type.name in PRODUCTS]
    nodes = onnx.load(str(file), load_external_data=False).graph.node
    assert products == [PRECISIONS[precision]] * sum(node.op_type in OPERATORS for node in nodes)
    assert len(network.build(RUNGS, sizes, for_this_gpu=False).plan) > 1000
    return len(products)
