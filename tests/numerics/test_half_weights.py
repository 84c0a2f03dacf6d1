"""Weights kept in float16: half the file, the arithmetic of float32, and every engine reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from distill_jobs.half_weights import LEAST_NUMBERS
from distill_jobs.onnx_export import ExportError, write_graph
from distill_jobs.parity import PARITY_ROWS, write_checked
from engines.backends.load import load_graph
from engines.int8_graph import quantize_graph
from engines.manifest import GraphSpec, TensorSpec

WIDTH = 48
INPUTS = (TensorSpec(name="latent", dtype="float32", shape=(-1, 3, 8, 8)),)
OUTPUTS = (TensorSpec(name="next_latent", dtype="float32", shape=(-1, 3, 8, 8)),)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, WIDTH, 3, padding=1), nn.SiLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(WIDTH, 3, 3, padding=1)).requires_grad_(False).eval()


def latents(rows: int) -> torch.Tensor:
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, GraphSpec]]:
    folder, module, found = tmp_path_factory.mktemp("half"), network(), {}
    for weights in ("float32", "float16"):
        path = folder / f"{weights}.onnx"
        spec = write_checked(module, [latents(PARITY_ROWS)], INPUTS, OUTPUTS, path, 1e-4, weights=weights)
        found[weights] = path, spec
    return found


def test_large_weights_take_half_the_bytes_and_small_ones_stay(files: dict[str, tuple[Path, GraphSpec]]) -> None:
    whole, half = (onnx.load(str(files[name][0])) for name in ("float32", "float16"))
    numbers = sorted(numpy_helper.to_array(t).size for t in whole.graph.initializer)
    assert sum(size >= LEAST_NUMBERS for size in numbers) == 3
    kinds = {(t.data_type, numpy_helper.to_array(t).size >= LEAST_NUMBERS) for t in half.graph.initializer}
    assert kinds == {(onnx.TensorProto.FLOAT16, True), (onnx.TensorProto.FLOAT, False)}
    onnx.checker.check_model(half, full_check=True)
    assert files["float16"][0].stat().st_size < 0.6 * files["float32"][0].stat().st_size


def test_the_manifest_records_what_rounding_costs(files: dict[str, tuple[Path, GraphSpec]]) -> None:
    exact, rounded = (files[name][1].parity.max_abs_error for name in ("float32", "float16"))
    assert exact < 1e-6
    assert 1e-5 < rounded < 1e-2


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
def test_engines_compute_what_rounded_weights_give(files: dict[str, tuple[Path, GraphSpec]], backend: str) -> None:
    rounded = network()
    for weight in rounded.parameters():
        if weight.numel() >= LEAST_NUMBERS:
            weight.copy_(weight.half())
    rows = latents(5)
    engine = load_graph(backend, *files["float16"], threads=1)
    try:
        got = engine.run({"latent": rows.numpy()})["next_latent"]
    finally:
        engine.close()
    np.testing.assert_allclose(got, rounded(rows).numpy(), atol=1e-5)


def test_int8_is_made_of_them_as_of_float32(files: dict[str, tuple[Path, GraphSpec]]) -> None:
    path, _ = files["float16"]
    batches = [{"latent": latents(2).numpy()}]
    made = quantize_graph(onnx.load(str(path)), batches, path.parent)
    kinds = {t.data_type for t in made.graph.initializer}
    assert onnx.TensorProto.INT8 in kinds
    assert onnx.TensorProto.FLOAT16 not in kinds


def test_a_weight_too_large_is_refused_by_name(tmp_path: Path) -> None:
    module = network()
    module[2].weight.data[0, 0, 0, 0] = 1e6
    with pytest.raises(
        ExportError, match=r"x: weight 2\.weight is too large for float16; keep its weights in float32"
    ):
        write_graph(module, [latents(2)], INPUTS, OUTPUTS, tmp_path / "x.onnx", "float16")
    assert not (tmp_path / "x.onnx").exists()
