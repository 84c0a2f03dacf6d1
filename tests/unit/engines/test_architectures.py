"""Every graph of Stable Diffusion's architectures, scaled down, to TensorRT and to torch, without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

import onnx
import pytest

from engines.backends.base import Precision
from engines.backends.torch_fused import fuse
from tests.support.compiled import check_compiles
from tests.support.on_torch import check_on_torch
from tests.support.scaled_down import Exported, random_rows, step_of, surroundings

PRECISIONS = [
    pytest.param("float32", marks=pytest.mark.long),
    "bfloat16",
    pytest.param("float16", marks=pytest.mark.long),
]
"""Exporting takes most of the time, and is done once: CI compiles what a GPU is asked for first."""

STEPS = ("sd15", "sd21", "sdxl", "inpaint")
SURROUNDINGS = {
    "sd15": ("condition", "decode", "decode_tiny", "encode"),
    "sd21": ("condition",),
    "sdxl": ("condition",),
}
"""The autoencoder and the tiny decoder are one for all; text encoders differ."""


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    return cache(lambda kind: step_of(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture(scope="module")
def around(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Exported]]:
    return cache(lambda kind: list(surroundings(kind, tmp_path_factory.mktemp(kind), SURROUNDINGS[kind])))


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_step_graph_compiles(
    trt: ModuleType, step: Callable[[str], Exported], kind: str, precision: Precision
) -> None:
    assert check_compiles(trt, step(kind).file, step(kind).spec, precision) > 0


@pytest.mark.parametrize("kind", SURROUNDINGS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_text_encoders_and_autoencoder_compile(
    trt: ModuleType, around: Callable[[str], list[Exported]], kind: str, precision: Precision
) -> None:
    for exported in around(kind):
        assert check_compiles(trt, exported.file, exported.spec, precision) > 0, exported.name


@pytest.mark.parametrize("kind", STEPS)
def test_every_step_graph_runs_on_torch(step: Callable[[str], Exported], kind: str) -> None:
    check_on_torch(step(kind).file, step(kind).spec, random_rows(step(kind), 3))
    check_fused(step(kind))


@pytest.mark.parametrize("kind", SURROUNDINGS)
def test_text_encoders_and_autoencoder_run_on_torch(around: Callable[[str], list[Exported]], kind: str) -> None:
    for exported in around(kind):
        check_on_torch(exported.file, exported.spec, random_rows(exported, 3))
        if not exported.name.endswith("decode_tiny"):  # convolutions alone
            check_fused(exported)


def check_fused(exported: Exported) -> None:
    """All attention, and every product with a bias, is one operator: exporters may change how they spell it."""
    graph = onnx.load(str(exported.file)).graph
    fuse(graph)
    makers = {name: node.op_type for node in graph.node for name in node.output}
    biases = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 1}
    assert {"Attention", "Linear"} <= set(makers.values())
    assert "Softmax" not in makers.values()
    added = [node for node in graph.node if node.op_type == "Add" and biases & set(node.input)]
    assert not [node for node in added if "MatMul" in {makers.get(name) for name in node.input}]
