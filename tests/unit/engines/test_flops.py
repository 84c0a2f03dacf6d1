"""The arithmetic of graphs, against torch's own count and against the textbook."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from onnx import TensorProto, helper
from torch.utils.flop_counter import FlopCounterMode

from engines.backends.load import BACKENDS, BackendName, load_graph
from engines.bundle import verify_bundle
from engines.ceiling import CPU, GPU, matmul_ceiling, write_products
from engines.errors import BackendError
from engines.flops import product_flops

DIGITS = Path(__file__).parents[3] / "server" / "bundles" / "digits"


def test_a_networks_products_are_those_torch_counts() -> None:
    """Of the digits, whose recipe has its network's arguments."""
    bundle = verify_bundle(DIGITS)
    config = yaml.safe_load(bundle.manifest.recipe.text)["unet"]
    size, told = bundle.manifest.sizes[0], bundle.manifest.condition
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        unet = UNet2DConditionModel(**config, time_cond_proj_dim=256)
        latent = torch.empty(1, config["in_channels"], size.latent_height, size.latent_width)
        condition, guidance = torch.empty(1, told.tokens, told.width), torch.empty(1, 256)
        unet(latent, torch.ones(1), condition, timestep_cond=guidance)
    counted = product_flops(bundle.graph_file(bundle.manifest.students[0].graph))
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


def write(file: Path, node: onnx.NodeProto, out: list[int | str | None], **shapes: list[int | str]) -> Path:
    def info(name: str, shape: object) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph([node], "one", [info(*item) for item in shapes.items()], [info("y", out)])
    onnx.save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), str(file))
    return file


def test_other_products(tmp_path: Path) -> None:
    gemm = helper.make_node("Gemm", ["a", "b"], ["y"], transA=1)
    file = write(tmp_path / "gemm.onnx", gemm, [5, 3], a=["k", 5], b=[1, 3])
    assert product_flops(file) == 2 * 5 * 1 * 3
    up = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2], kernel_shape=[2, 2])
    file = write(tmp_path / "up.onnx", up, [1, 3, 8, 8], x=["n", 6, 4, 4], w=[6, 3, 2, 2])
    assert product_flops(file) == pytest.approx(2 * 16 * 6 * 3 * 4)


def test_a_product_of_unknown_shape_is_named(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["a", "b"], ["y"])
    with pytest.raises(BackendError, match="shape of 'b' cannot be told"):
        product_flops(write(tmp_path / "m.onnx", node, [None, None], a=["n", 4], b=["n", "columns"]))


@pytest.mark.parametrize(("side", "products"), [CPU, GPU], ids=["CPU", "GPU"])
def test_the_ceiling_moves_next_to_nothing_and_counts_what_it_computes(
    tmp_path: Path, side: int, products: int
) -> None:
    """A GPU computes some 20,000 FLOP in the time of a byte to or from it."""
    file = tmp_path / "products.onnx"
    spec = write_products(file, side, products)
    flops = product_flops(file)
    assert flops == 2 * side**3 * products
    moved = sum(4 * abs(np.prod(tensor.shape)) for tensor in (*spec.inputs, *spec.outputs))
    assert moved * 20_000 < 0.05 * flops


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_ceilings_products_are_of_its_input(tmp_path: Path, backend: BackendName) -> None:
    file = tmp_path / "products.onnx"
    engine = load_graph(backend, file, write_products(file, 32, 3), threads=1)
    w = onnx.numpy_helper.to_array(onnx.load(str(file)).graph.initializer[0])
    x = np.random.default_rng(2).standard_normal((2, 1, 32), dtype=np.float32)
    expected = np.maximum((x * w) @ w @ w @ w, 0).mean(1)
    np.testing.assert_allclose(engine.run({"x": x})["y"], expected, atol=1e-6)
    assert np.abs(expected[0] - expected[1]).max() > 0.01


@pytest.mark.parametrize(("backend", "precision"), [("onnxruntime", "float32"), ("openvino", "bfloat16")])
def test_the_ceiling_is_measured_in_the_engine_asked_for(backend: str, precision: str) -> None:
    assert matmul_ceiling(backend, precision, 0, 1) > 0  # type: ignore[arg-type]


def test_the_ceiling_of_a_precision_that_is_not_offered_is_refused() -> None:
    with pytest.raises(BackendError, match="float32 only"):
        matmul_ceiling("onnxruntime", "bfloat16", 0, 1)
