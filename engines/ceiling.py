"""The most arithmetic an engine's library does here: products of square matrices, timed in the very engine.

It runs in the backend, precision and threads that are benched. The graph makes its matrices from one row and gives
one back: what is copied to a GPU and back is nothing beside the products.
"""

from __future__ import annotations

import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.backends.load import ON_GPU, PrecisionName, choose_backend, load_graph
from engines.flops import product_flops
from engines.manifest import GraphSpec, Parity, TensorSpec

CPU, GPU = (1024, 2), (4096, 128)
"""Side of the matrices, and how many products a call holds: tens of milliseconds."""


def matmul_ceiling(backend: str, precision: PrecisionName, threads: int, repeats: int) -> float:
    """GFLOP/s of the best of ``repeats`` calls, a multiply-add counting two. Raises: BackendError."""
    side, products = GPU if choose_backend(backend) in ON_GPU else CPU
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "products.onnx"
        spec = write_products(file, side, products)
        engine = load_graph(backend, file, spec, precision=precision, threads=threads, rungs=(1,))
        rows = {"x": np.random.default_rng(0).standard_normal((1, 1, side), dtype=np.float32)}
        times = []
        for _ in range(1 + max(3, repeats)):
            started = time.perf_counter()
            engine.run(rows)
            times.append(time.perf_counter() - started)
        engine.close()
        flops = product_flops(file)
    return 1e-9 * flops / min(times[1:])


def write_products(file: Path, side: int, products: int) -> GraphSpec:
    """y, (B, side): the mean over rows of relu((x * w) w … w). x: (B, 1, side); w, (side, side), keeps the scale.

    Relu keeps the mean behind the products: the mean of a product is the product of a mean, of one row.
    """
    w = np.random.default_rng(1).standard_normal((side, side), dtype=np.float32) / np.float32(side**0.5)
    names = [f"x{i}" for i in range(products + 1)]
    nodes = [
        helper.make_node("Mul", ["x", "w"], names[:1]),
        *(helper.make_node("MatMul", [a, "w"], [b]) for a, b in pairwise(names)),
        helper.make_node("Relu", names[-1:], ["positive"]),
        helper.make_node("ReduceMean", ["positive", "rows"], ["y"], keepdims=0),
    ]
    x = TensorSpec(name="x", dtype="float32", shape=(-1, 1, side))
    y = TensorSpec(name="y", dtype="float32", shape=(-1, side))
    ends = [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, ["batch", *t.shape[1:]]) for t in (x, y)]
    constants = [numpy_helper.from_array(w, "w"), numpy_helper.from_array(np.array([1]), "rows")]
    graph = helper.make_graph(nodes, "products", ends[:1], ends[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save_model(model, str(file))
    parity = Parity(reference="none", max_abs_error=0, mean_abs_error=0, rows=0)
    return GraphSpec(file=file.name, inputs=(x,), outputs=(y,), parity=parity, lowered={"float16": parity})
