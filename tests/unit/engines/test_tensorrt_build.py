"""Every graph of our own architectures becomes a TensorRT plan, on a machine without a GPU; and what does not."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the field's name for it)

from distill_jobs.parity import write_checked
from engines.backends.base import Precision
from engines.backends.tensorrt_build import Network, _use_timings
from engines.bundle import Bundle
from engines.errors import BackendError
from engines.manifest import CONDITION_GRAPH, DECODE_GRAPH, ENCODE_GRAPH, TensorSpec
from tests.support.compiled import PRECISIONS, RUNGS, check_compiles
from tests.support.step_rows import step_spec
from tests.support.toy_bundle import ToyOptions, make_toy_bundle

# ---- our own architectures


TOYS = {
    "one student each": ToyOptions(steps=(2,), default_steps=2),
    "shared, inverting": ToyOptions(steps=(2,), default_steps=2, shared=True, encoders=(2,), nan_class=3),
    "several sizes": ToyOptions(steps=(2,), default_steps=2, sizes=((64, 64), (96, 64))),
    "seeing": ToyOptions(steps=(2,), default_steps=2, seeing=True),
}


PIXELS = (CONDITION_GRAPH, DECODE_GRAPH, ENCODE_GRAPH)
"""Graphs without any product in toys: a table of classes, and pixels that are latents."""


@pytest.fixture(scope="module")
def compiled() -> set[tuple[str, Precision]]:
    """Which bytes compiled in which precision: what stands around the steps is the same in most bundles."""
    return set()


@pytest.mark.parametrize("options", TOYS.values(), ids=TOYS.keys())
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_graph_of_a_bundle_compiles(
    trt: ModuleType, tmp_path: Path, options: ToyOptions, precision: Precision, compiled: set[tuple[str, Precision]]
) -> None:
    bundle = make_toy_bundle(tmp_path / "toy", options)
    for graph, spec in bundle.manifest.graphs.items():
        key = bundle.manifest.files[spec.file].sha256, precision
        if key not in compiled:
            sizes = bundle.manifest.sizes if spec.free else ()
            products = check_compiles(trt, bundle.graph_file(graph), spec, precision, sizes)
            assert products > 0 or graph in PIXELS
            compiled.add(key)


def test_every_size_has_profiles_of_its_own(trt: ModuleType, tmp_path: Path) -> None:
    bundle = make_toy_bundle(tmp_path / "toy", TOYS["several sizes"])
    spec, sizes = bundle.manifest.graphs["decode"], bundle.manifest.sizes
    network = Network(trt, bundle.graph_file("decode"), spec)
    one, two = (len(network.build(RUNGS, each, for_this_gpu=False).plan) for each in (sizes[:1], sizes))
    assert two > one
    with pytest.raises(ValueError, match="say which sizes"):
        network.build(RUNGS, for_this_gpu=False)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_exported_unet_compiles(trt: ModuleType, unet_file: Path, precision: Precision) -> None:
    assert check_compiles(trt, unet_file, step_spec(unet_file), precision) > 0


class MaskedAttention(nn.Module):
    """As text encoders have it, with their true heads of 64: only such are fused."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(128, 384), nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.into(x).unflatten(2, (3, 2, 64)).permute(2, 0, 3, 1, 4)
        seen = torch.ones(77, 77, dtype=torch.bool).tril()
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.out(attended.transpose(1, 2).flatten(2))


def test_masked_attention_is_fused_in_16_bits(trt: ModuleType, tmp_path: Path) -> None:
    specs = [(TensorSpec(name=name, dtype="float32", shape=(-1, 77, 128)),) for name in ("x", "y")]
    module, rows, file = MaskedAttention().requires_grad_(False), torch.randn(3, 77, 128), tmp_path / "masked.onnx"
    spec = write_checked(module, [rows], *specs, file, 1e-5, (1, 2))
    assert "IsNaN" not in {node.op_type for node in onnx.load(str(file)).graph.node}
    for precision in ("bfloat16", "float16"):
        assert check_compiles(trt, file, spec, precision) > 0


# ---- what runs on a GPU alone


def test_the_library_has_all_that_a_plan_at_work_asks_of_it(trt: ModuleType) -> None:
    """Names in engines/backends/tensorrt_run.py, which no machine without a GPU comes to."""
    asked = {
        trt: ("Runtime",),
        trt.Runtime: ("deserialize_cuda_engine",),
        trt.ICudaEngine: ("device_memory_size_v2", "create_runtime_config", "create_execution_context"),
        trt.IRuntimeConfig: (
            "set_execution_context_allocation_strategy",
            "cuda_graph_strategy",
            "dynamic_shapes_kernel_specialization_strategy",
            "create_runtime_cache",
            "set_runtime_cache",
        ),
        trt.IRuntimeCache: ("serialize", "deserialize"),
        trt.ExecutionContextAllocationStrategy: ("USER_MANAGED",),
        trt.CudaGraphStrategy: ("WHOLE_GRAPH_CAPTURE",),
        trt.DynamicShapesKernelSpecializationStrategy: ("EAGER",),
        trt.IExecutionContext: (
            "set_device_memory",
            "set_optimization_profile_async",
            "set_input_shape",
            "set_tensor_address",
            "execute_async_v3",
        ),
    }
    missing = [(thing, name) for thing, names in asked.items() for name in names if not hasattr(thing, name)]
    assert not missing


@pytest.mark.parametrize(("refused", "taken"), [((), b"ours"), ((b"ours",), b""), ((b"ours", b""), None)])
def test_timings_that_the_library_refuses_are_left_out(refused: tuple[bytes, ...], taken: bytes | None) -> None:
    used: list[bytes] = []

    def set_timing_cache(cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache in refused:
            return False
        used.append(cache)
        return True

    config = SimpleNamespace(create_timing_cache=lambda known: known, set_timing_cache=set_timing_cache)
    if taken is None:
        with pytest.raises(BackendError, match="no timing cache"):
            _use_timings(config, b"ours")
    else:
        _use_timings(config, b"ours")
        assert used == [taken]


# ---- what is refused


def test_a_graph_other_than_its_manifest_is_refused(trt: ModuleType, toy: Bundle) -> None:
    spec = toy.manifest.graphs["decode"]
    file = toy.graph_file("decode")
    [latent] = spec.inputs
    for changed, message in (
        (latent.model_copy(update={"shape": (-1, 3, 8, 8)}), r"the manifest says .*\(-1, 3, 8, 8\)"),
        (latent.model_copy(update={"dtype": "float16"}), "the manifest says .*float16"),
        (TensorSpec(name="image", dtype="float32", shape=latent.shape), r"parsed with \['latent'\]"),
    ):
        with pytest.raises(BackendError, match=message):
            Network(trt, file, spec.model_copy(update={"inputs": (changed,)}))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_file_that_is_no_graph_is_refused(
    trt: ModuleType, tmp_path: Path, toy: Bundle, precision: Precision
) -> None:
    file = tmp_path / "bad.onnx"
    file.write_bytes(b"\x00not a graph")
    with pytest.raises(BackendError, match=r"bad\.onnx"):
        Network(trt, file, toy.manifest.graphs["decode"], precision)


def test_an_operator_it_does_not_know_is_named(trt: ModuleType, tmp_path: Path, toy: Bundle) -> None:
    model = onnx.load(str(toy.graph_file("decode")))
    model.graph.node[0].op_type = "Clop"
    file = tmp_path / "clop.onnx"
    file.write_bytes(model.SerializeToString())
    with pytest.raises(BackendError, match=r"cannot parse .*clop\.onnx: .*Clop"):
        Network(trt, file, toy.manifest.graphs["decode"])
