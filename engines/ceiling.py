"""The most arithmetic an engine's library does here: products of square matrices, timed in the very engine.

It runs in the backend, precision and threads that are benched. The graph is a chain of products, so that the copies
of its input and output to a GPU count little.
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
from engines.manifest import GraphSpec, Parity, TensorSpec

_CPU, _GPU = (1024, 2), (4096, 128)
"""Side of the matrices, and how many products a call holds: tens of milliseconds."""


def matmul_ceiling(backend: str, precision: PrecisionName, threads: int, repeats: int) -> float:
    """GFLOP/s of the best of ``repeats`` calls, a multiply-add counting two. Raises: BackendError."""
    side, products = _GPU if choose_backend(backend) in ON_GPU else _CPU
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "products.onnx"
        spec = _write_products(file, side, products)
        engine = load_graph(backend, file, spec, precision=precision, threads=threads, rungs=(1,))
        rows = {"x": np.random.default_rng(0).standard_normal((1, side, side), dtype=np.float32)}
        times = []
        for _ in range(1 + max(3, repeats)):
            started = time.perf_counter()
            engine.run(rows)
            times.append(time.perf_counter() - started)
        engine.close()
    return 2e-9 * side**3 * products / min(times[1:])


def _write_products(file: Path, side: int, products: int) -> GraphSpec:
    """x: (B, side, side), multiplied again and again by one matrix that keeps its scale."""
    weight = np.random.default_rng(1).standard_normal((side, side), dtype=np.float32) / np.float32(side**0.5)
    names = ["x", *(f"x{i}" for i in range(1, products)), "y"]
    nodes = [helper.make_node("MatMul", [a, "w"], [b]) for a, b in pairwise(names)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", side, side]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "products", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save_model(model, str(file))
    x, y = (TensorSpec(name=name, dtype="float32", shape=(-1, side, side)) for name in ("x", "y"))
    parity = Parity(reference="none", max_abs_error=0, mean_abs_error=0, rows=0)
    return GraphSpec(file=file.name, inputs=(x,), outputs=(y,), parity=parity, lowered={"float16": parity})
