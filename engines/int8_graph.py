"""A float32 ONNX graph with the products of its network body in int8, by NNCF's post-training quantization.

Convolutions and matrix products with weights hold nearly all the arithmetic. Their weights become int8 (per
channel) and their inputs 8 bits (per tensor), between QuantizeLinear and DequantizeLinear, which an engine fuses
into them. Float stay the first product on the way from each input, the last on the way to an output, everything
computed from w, the timestep and the grid alone, attention's products of two activations, normalisations, and the
sampler's update.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from engines.bundle import INLINE_LIMIT_BYTES
from engines.errors import BackendError
from engines.manifest import GRID, GUIDANCE, TIME_IDS, TIMESTEP

Arrays = dict[str, NDArray[Any]]

PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})
_SCALARS = frozenset({TIMESTEP, GUIDANCE, GRID, TIME_IDS})


def check_installed() -> None:
    """Raises: BackendError when NNCF is missing."""
    if find_spec("nncf") is None or find_spec("onnxruntime") is None:
        raise BackendError(
            "int8 is made by NNCF on ONNX Runtime; install both in the checkout: pip install -e '.[int8]'"
        )


def quantize_graph(model: onnx.ModelProto, batches: Sequence[Arrays], folder: Path) -> onnx.ModelProto:
    """A copy of ``model`` whose body computes in int8, with all its weights inside.

    batches: inputs the graph meets in service; the ranges of its activations come from them. folder: holds the
    weights that ``model`` keeps in a file of their own.
    Raises: BackendError when NNCF is missing, or nothing but first and last products is there.
    """
    check_installed()
    import nncf  # noqa: PLC0415 - heavy, and optional
    from nncf.onnx.quantization.backend_parameters import BackendParameters  # noqa: PLC0415

    named = _named(_in_float32(model, folder))
    lowered = body_products(named)
    if not lowered:
        raise BackendError("this graph has no product between its first and its last: nothing to lower to int8")
    others = [node.name for node in named.graph.node if node.name not in lowered]
    named.graph.value_info.extend(_shapes(named))
    # Its own set_log_level would also mute whatever handlers others hung there, such as a test runner's.
    logging.getLogger("nncf").setLevel(logging.ERROR)
    with redirect_stdout(StringIO()):  # its progress bars
        made: onnx.ModelProto = nncf.quantize(
            named,
            nncf.Dataset(list(batches)),
            preset=nncf.QuantizationPreset.MIXED,  # activations after SiLU lie to one side of zero
            subset_size=len(batches),
            ignored_scope=nncf.IgnoredScope(names=others),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                backend_params={BackendParameters.EXTERNAL_DATA_DIR: str(folder.resolve())}
            ),
        )
    del made.graph.value_info[:]
    return made


def body_products(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes to lower. model: in topological order, every node named."""
    sources = {value.name: frozenset({value.name}) for value in model.graph.input}
    behind: set[str] = set()  # values computed from a product
    candidates: dict[str, str] = {}
    for node in model.graph.node:
        computed = [name for name in node.input if name in sources]
        if not computed:
            continue
        of = frozenset().union(*(sources[name] for name in computed))
        product = node.op_type in PRODUCTS and len(computed) == 1 and not of <= _SCALARS
        later = not behind.isdisjoint(computed)
        if product and later:
            candidates[node.name] = node.output[0]
        sources |= dict.fromkeys(node.output, of)
        if product or later:
            behind |= set(node.output)
    ahead = _before_a_product(model, set(candidates))
    return {name for name, output in candidates.items() if output in ahead}


def _before_a_product(model: onnx.ModelProto, products: set[str]) -> set[str]:
    """Values that one of the products is computed from."""
    ahead: set[str] = set()
    for node in reversed(model.graph.node):
        if node.name in products or ahead & set(node.output):
            ahead |= set(node.input)
    return ahead


def _in_float32(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """A copy whose weights are float32, not kept in 16 bits and cast: NNCF finds none behind a cast.

    Raises: BackendError when they are too large for one message.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    stored = {tensor.name: tensor for tensor in copy.graph.initializer}
    kept = (tensor for tensor in stored.values() if tensor.data_type == onnx.TensorProto.FLOAT16)
    if 4 * sum(math.prod(tensor.dims) for tensor in kept) > INLINE_LIMIT_BYTES:
        raise BackendError("int8 of so large a model is made from weights in float32: export it with them")
    for node in [node for node in copy.graph.node if node.op_type == "Cast" and node.input[0] in stored]:
        tensor = stored[node.input[0]]
        if tensor.data_type == onnx.TensorProto.FLOAT16:
            values = numpy_helper.to_array(tensor, str(folder)).astype(np.float32)
            copy.graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
            copy.graph.initializer.remove(tensor)
            copy.graph.node.remove(node)
    return copy


def _named(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for i, node in enumerate(copy.graph.node):
        node.name = f"{node.op_type}_{i}"
    return copy


def _shapes(model: onnx.ModelProto) -> Sequence[onnx.ValueInfoProto]:
    """Of every value: NNCF sees no edge where one is missing.

    ONNX infers none behind a group normalisation of a free batch, so it is taken out for this.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for node in copy.graph.node:
        if node.op_type == "GroupNormalization":
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    known: Sequence[onnx.ValueInfoProto] = onnx.shape_inference.infer_shapes(copy, data_prop=True).graph.value_info
    return known
