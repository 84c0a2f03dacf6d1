"""The torch engine for GPUs, rehearsed on the CPU: its results, no value read back, the host's memory."""

from __future__ import annotations

import gc
import shutil
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engines.backends import load
from engines.backends import torch as torch_backend
from engines.backends.base import Precision
from engines.backends.cuda import Device
from engines.backends.graph_file import read_graph
from engines.backends.load import source_sha256
from engines.backends.torch import TorchBackend, tensor_of
from engines.backends.torch_cuda import TorchCudaBackend
from engines.backends.torch_fused import fused_module
from engines.bundle import Bundle, verify_bundle
from engines.condition import load_tokenizer
from engines.errors import BackendError, OutOfMemoryError
from engines.examples import example_inputs
from engines.manifest import LATENT
from tests.support.on_torch import check_on_torch, run_on_meta
from tests.support.step_rows import random_rows, step_spec

RUNGS = (1, 2, 4)


def test_the_rehearsal_computes_what_the_cpu_backend_does(unet_file: Path) -> None:
    spec, rows = step_spec(unet_file), random_rows(5, seed=2)
    rehearsal = TorchCudaBackend(unet_file, spec, rungs=RUNGS, device="cpu")
    expected = TorchBackend(unet_file, spec).run(rows)
    first = rehearsal.run(rows)
    for name, array in first.items():
        np.testing.assert_allclose(array, expected[name], atol=1e-5)
    kept = {name: array.copy() for name, array in first.items()}
    rehearsal.run(random_rows(5, seed=3))
    for name, array in first.items():
        np.testing.assert_array_equal(array, kept[name])
    rows[LATENT] = rows[LATENT][:, :, :3]
    with pytest.raises(BackendError, match=r"torch failed on step\.onnx: latent must be float32"):
        rehearsal.run(rows)
    assert rehearsal.release()
    for name, array in rehearsal.run(random_rows(5, seed=2)).items():
        np.testing.assert_array_equal(array, kept[name])
    rehearsal.close()
    rehearsal.close()
    with pytest.raises(BackendError, match="load it again"):
        rehearsal.run(rows)


def test_no_graph_of_a_bundle_reads_a_value_back(toy: Bundle) -> None:
    tokenizer = load_tokenizer(toy)
    for graph, spec in toy.manifest.graphs.items():
        rows = example_inputs(toy.manifest, tokenizer, graph, 3)
        outputs = run_on_meta(onnx.load(str(toy.graph_file(graph))), rows)
        assert {n: tuple(t.shape) for n, t in outputs.items()} == {t.name: (3, *t.shape[1:]) for t in spec.outputs}
        assert {tensor.device.type for tensor in outputs.values()} == {"meta"}


@pytest.mark.parametrize("name", ["emoji", "digits"])
def test_an_embedded_bundle_runs_on_torch(name: str) -> None:
    """emoji has a text encoder, and decodes with a tiny decoder."""
    bundle = verify_bundle(Path("server/bundles", name))
    tokenizer = load_tokenizer(bundle)
    for graph, spec in bundle.manifest.graphs.items():
        check_on_torch(bundle.graph_file(graph), spec, example_inputs(bundle.manifest, tokenizer, graph, 3))


def test_a_torch_engine_says_what_does_not_fit_by_its_type(
    unet_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine = TorchCudaBackend(unet_file, step_spec(unet_file), rungs=RUNGS, device="cpu")
    monkeypatch.setattr(engine, "_module", full)
    with pytest.raises(OutOfMemoryError, match=r"step\.onnx finds no memory for 2 rows"):
        engine.run(random_rows(2, seed=0))


class Casts(TorchDispatchMode):
    """Shapes of what is cast to 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype in (torch.bfloat16, torch.float16):
            self.shapes.add(tuple(out.shape))
        return out


def test_weights_are_cast_when_the_engine_is_loaded_and_never_again(toy: Bundle) -> None:
    model = onnx.load(str(toy.graph_file("step_4")))
    weights = {tuple(tensor.dims) for tensor in model.graph.initializer if len(tensor.dims) > 1}
    module = fused_module(model, "bfloat16", "meta")
    rows = example_inputs(toy.manifest, load_tokenizer(toy), "step_4", 3)
    inputs = {name: torch.from_numpy(array).to("meta") for name, array in rows.items()}
    module(inputs)  # copies what is both a shape and data
    with Casts() as casts:
        module(inputs)
    assert casts.shapes
    assert weights
    assert not casts.shapes & weights


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_unet_reads_no_value_back(unet_file: Path, precision: Precision) -> None:
    outputs = run_on_meta(onnx.load(str(unet_file)), random_rows(2, seed=0), precision)
    assert {tuple(tensor.shape) for tensor in outputs.values()} == {(2, 1, 8, 8)}
    assert {tensor.dtype for tensor in outputs.values()} == {torch.float32}


def test_costs_of_other_code_or_another_build_of_torch_are_not_found(
    toy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "find_device", lambda: Device("NVIDIA H200", (9, 0), "580.65.06"))
    key = load.engine_key(toy, "step_4", "torch-cuda", "bfloat16", 0)
    assert key.source == source_sha256("torch-cuda")
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu126")
    assert load.engine_key(toy, "step_4", "torch-cuda", "auto", 0).engine == "torch-cuda 2.13.0+cu126 float32"


# ---- the host's memory


@pytest.fixture(scope="module")
def beside(unet_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The UNet with everything it stores in a file beside it, as a large network's weights are."""
    file = tmp_path_factory.mktemp("beside") / "step.onnx"
    model, options = onnx.load(str(unet_file)), {"location": "step.onnx.data", "size_threshold": 0}
    onnx.save_model(model, str(file), save_as_external_data=True, **options)
    return file


def host_bytes() -> int:
    """Of all tensors in the host's memory."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.device.type == "cpu"]
    return sum({s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}.values())


@pytest.mark.parametrize(("device", "share"), [("meta", 0.01), ("cpu", 0.6)], ids=["on a device", "on the CPU"])
def test_the_host_keeps_no_weight_but_those_that_it_computes_with(beside: Path, device: str, share: float) -> None:
    """Of float32's bytes: lowered weights are half of them, and on a device none are left here."""
    stored = beside.with_name("step.onnx.data").stat().st_size
    assert read_graph(beside).ByteSize() < 0.2 * stored
    before = host_bytes()
    module = fused_module(read_graph(beside), "bfloat16", device, beside.parent)
    inputs = {name: torch.from_numpy(array).to(device) for name, array in random_rows(2, seed=0).items()}
    outputs = module(inputs)
    assert len(outputs) == 2
    del inputs, outputs
    assert host_bytes() - before < share * stored


def test_weights_are_read_one_at_a_time(beside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight is put together, cast and moved before the next is read; lengths and factors of a Resize stay."""
    read: list[weakref.ref[torch.Tensor]] = []
    held: list[int] = []

    def reading(*arguments: Any) -> torch.Tensor:
        tensor = tensor_of(*arguments)
        read.append(weakref.ref(tensor))
        alive = [each for ref in read if (each := ref()) is not None]
        held.append(sum(each.numel() for each in alive if each.is_floating_point() and each.numel() > 4))
        return tensor

    monkeypatch.setattr(torch_backend, "tensor_of", reading)
    module = fused_module(read_graph(beside), "bfloat16", "meta", beside.parent)
    assert len(held) > 50
    assert max(held) == max(weight.numel() for weight in module.weights.values())


def test_weights_beside_a_graph_are_those_within_it(unet_file: Path, beside: Path) -> None:
    rows = random_rows(3, seed=4)
    engines = [TorchCudaBackend(file, step_spec(file), rungs=(4,), device="cpu") for file in (unet_file, beside)]
    within, outside = (engine.run(rows) for engine in engines)
    for name, array in within.items():
        np.testing.assert_array_equal(array, outside[name])


def test_weights_that_are_missing_are_named(beside: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copy(beside, tmp_path))
    for backend in (TorchBackend, partial(TorchCudaBackend, device="cpu")):
        with pytest.raises(BackendError, match=f"cannot be read from {tmp_path}"):
            backend(alone, step_spec(alone))
