"""Weights kept in float16: half the file, the arithmetic of float32, and every engine reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from distill_jobs import onnx_export
from distill_jobs.half_weights import LEAST_NUMBERS, round_weights
from distill_jobs.onnx_export import ExportError, write_graph
from distill_jobs.parity import PARITY_ROWS, write_checked
from engines import int8_graph
from engines.backends import openvino
from engines.backends.load import load_graph
from engines.backends.lowering import lower_products
from engines.errors import BackendError
from engines.int8_graph import quantize_graph
from engines.manifest import GraphSpec, Lowered, TensorSpec

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


def test_openvino_counts_them_by_what_they_take_in_memory(files: dict[str, tuple[Path, GraphSpec]]) -> None:
    whole, half = (openvino._core().read_model(files[name][0]) for name in ("float32", "float16"))
    assert openvino._weight_bytes(half) == pytest.approx(openvino._weight_bytes(whole), rel=0.01)


def test_the_manifest_records_what_rounding_costs_apart_from_the_export(
    files: dict[str, tuple[Path, GraphSpec]],
) -> None:
    assert all(spec.parity.max_abs_error < 1e-6 for _, spec in files.values())
    assert files["float32"][1].rounded is None
    rounded = files["float16"][1].rounded
    assert rounded is not None
    assert 1e-5 < rounded.max_abs_error < 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lowered_graphs_stay_graphs(files: dict[str, tuple[Path, GraphSpec]], dtype: Lowered) -> None:
    lowered = onnx.load(str(files["float16"][0]))
    lower_products(lowered, dtype)
    onnx.checker.check_model(lowered, full_check=True)
    made = [name for node in lowered.graph.node for name in node.output]
    made += [tensor.name for tensor in lowered.graph.initializer]
    assert len(made) == len(set(made))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
def test_engines_compute_what_rounded_weights_give(files: dict[str, tuple[Path, GraphSpec]], backend: str) -> None:
    rounded = network()
    for weight in rounded.parameters():
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
    same, rounded = path.parent / "rounded.onnx", network()
    round_weights(rounded)
    write_graph(rounded, [latents(2)], INPUTS, OUTPUTS, same)
    wanted = quantize_graph(onnx.load(str(same)), batches, path.parent)
    assert [node.op_type for node in made.graph.node] == [node.op_type for node in wanted.graph.node]
    found, expected = ([numpy_helper.to_array(t) for t in m.graph.initializer] for m in (made, wanted))
    int8 = [array for array in expected if array.dtype == np.int8 and array.ndim == 4]
    assert len(int8) == 1
    assert any(np.array_equal(array, int8[0]) for array in found)


def test_int8_of_weights_too_large_for_one_message_is_refused(
    files: dict[str, tuple[Path, GraphSpec]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8_graph, "INLINE_LIMIT_BYTES", 1000)
    path, _ = files["float16"]
    with pytest.raises(BackendError, match="made from weights in float32"):
        quantize_graph(onnx.load(str(path)), [{"latent": latents(2).numpy()}], path.parent)


def test_weights_beside_the_graph_are_kept_in_half_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "INLINE_LIMIT_BYTES", 1000)
    path = tmp_path / "beside.onnx"
    spec = write_checked(network(), [latents(PARITY_ROWS)], INPUTS, OUTPUTS, path, 1e-4, weights="float16")
    assert spec.parity.max_abs_error < 1e-6
    [beside] = [file for file in tmp_path.iterdir() if file != path]
    assert beside.stat().st_size < 2.5 * sum(weight.numel() for weight in network().parameters())


def test_what_embeds_guidance_and_time_keeps_its_weights() -> None:
    module = nn.ModuleDict({"time_embedding": nn.Linear(8, 8), "conv": nn.Linear(8, 8)})
    before = {name: weight.clone() for name, weight in module.named_parameters()}
    round_weights(module)
    for name, weight in module.named_parameters():
        assert torch.equal(weight, before[name]) == name.startswith("time_embedding"), name
        assert torch.equal(weight, before[name].half().float()) == name.startswith("conv"), name


def test_a_weight_too_large_is_refused_by_name(tmp_path: Path) -> None:
    module = network()
    module[2].weight.data[0, 0, 0, 0] = 1e6
    told = r"x: weight 2\.weight is too large for float16; keep weights in float32: export\.weights"
    with pytest.raises(ExportError, match=told):
        write_checked(module, [latents(2)], INPUTS, OUTPUTS, tmp_path / "x.onnx", 1, (1, 1), weights="float16")
    assert not (tmp_path / "x.onnx").exists()
