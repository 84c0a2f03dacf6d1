"""A step graph of several sizes: one export, proved at each, the same on every engine; SDXL's is told the size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import UNet2DConditionModel

from distill_jobs.errors import RecipeError
from distill_jobs.graphs import StepGraph
from distill_jobs.parity import LOWERED_ROWS, STEP_LIMIT, step_rows, write_at_sizes
from distill_jobs.pipelines.packing import Packing
from distill_jobs.sizes import BundleSizes, Shape, halvings, sizes_of
from engines.backends.base import Precision
from engines.backends.load import BACKENDS, load_graph
from engines.backends.openvino import OpenVinoBackend
from engines.backends.tensorrt_build import Network
from engines.backends.torch_fused import fused_module
from engines.calls import row_shapes
from engines.flops import product_flops
from engines.manifest import TIME_IDS, GraphSpec, GuidanceRange
from engines.sampler import sampler_plan
from engines.schedule import NoiseSchedule, ScheduleSpec
from tests.support import tiny_pipelines as tiny

PLAN = sampler_plan(NoiseSchedule(ScheduleSpec()), 2)
RANGE = GuidanceRange(min=1, max=15, default=5)
PACKING = Packing(tokens=7, width=16, pooled=24, side_px=16)
SCALE = 2
TRAINED: Shape = (4, 8, 8)
UNET: dict[str, Any] = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "mid_block_type": None,
    "time_cond_proj_dim": 256,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}


@dataclass(frozen=True)
class Exported:
    """A tiny SDXL's step graph. sizes: square, wide, high."""

    step: StepGraph
    sizes: BundleSizes
    file: Path
    spec: GraphSpec

    def rows(self, shape: Shape, count: int) -> list[torch.Tensor]:
        conditions = torch.randn(32, PACKING.rows, PACKING.width, generator=torch.Generator().manual_seed(1))
        return [t[:count] for t in step_rows(self.step, [PLAN], RANGE, conditions, shape, SCALE)]

    def feed(self, index: int, count: int = 4) -> dict[str, np.ndarray]:
        rows = self.rows(self.sizes.shape(self.sizes.sizes[index]), count)
        return {name: tensor.numpy() for name, tensor in zip(self.step.names, rows, strict=True)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    unet: UNet2DConditionModel = tiny.unet(PACKING.width, **UNET).eval().requires_grad_(False)
    step, file = StepGraph(unet, PACKING.unpack), tmp_path_factory.mktemp("sized") / "step.onnx"
    sizes = sizes_of(["16x16", "24x16", "8x20"], TRAINED, SCALE, halvings(UNET))
    specs = step.inputs(*sizes.axes, tokens=PACKING.rows), step.outputs(*sizes.axes)
    unproved = Exported(step, sizes, file, GraphSpec.model_construct())
    spec = write_at_sizes(step, lambda shape: unproved.rows(shape, 32), sizes, specs, file, STEP_LIMIT)
    return Exported(step, sizes, file, spec)


def test_parity_is_proved_and_kept_for_every_size(exported: Exported) -> None:
    spec = exported.spec
    assert spec.free
    assert {tensor.name for tensor in spec.inputs if tensor.free} == {"latent", "noise", "known", "mask"}
    assert set(spec.parity_by_size) == {"16x16", "24x16", "8x20"}
    each = spec.parity_by_size.values()
    assert all(0 < parity.max_abs_error <= STEP_LIMIT for parity in each)
    assert spec.parity.max_abs_error == max(parity.max_abs_error for parity in each)
    assert spec.parity.rows == sum(parity.rows for parity in each) == 96
    for lowered in spec.lowered.values():
        assert lowered is not None
        assert lowered.rows == 3 * LOWERED_ROWS


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_steps_rows_of_every_size(exported: Exported, backend: str) -> None:
    engine = load_graph(backend, exported.file, exported.spec)
    for index, size in enumerate(exported.sizes.sizes):
        feed = exported.feed(index)
        with torch.no_grad():
            expected = exported.step(*exported.rows(exported.sizes.shape(size), 4))
        got = engine.run(feed)
        for name, want in zip(("next_latent", "clean"), expected, strict=True):
            np.testing.assert_allclose(got[name], want.numpy(), atol=1e-4)
        alone = engine.run({name: array[:1] for name, array in feed.items()})
        if backend != "torch":
            np.testing.assert_array_equal(alone["next_latent"], got["next_latent"][:1])


@pytest.mark.parametrize(("precision", "atol"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_openvino_runs_every_size_in_one_model(exported: Exported, precision: Precision, atol: float) -> None:
    """As it does with large graphs, and in bfloat16, whose head keeps the time ids in float32."""
    engine = OpenVinoBackend(exported.file, exported.spec, precision=precision, static=False)
    reference = load_graph("onnxruntime", exported.file, exported.spec)
    for index in range(3):
        feed = exported.feed(index)
        got, expected = engine.run(feed), reference.run(feed)
        np.testing.assert_allclose(got["clean"], expected["clean"], atol=atol)
        alone = engine.run({name: array[:1] for name, array in feed.items()})
        np.testing.assert_array_equal(alone["clean"], got["clean"][:1])


def test_the_network_is_told_the_size(exported: Exported) -> None:
    engine, feed = load_graph("onnxruntime", exported.file, exported.spec), exported.feed(1)
    assert feed[TIME_IDS][0].tolist() == [16, 24, 0, 0, 16, 24]
    other = {**feed, TIME_IDS: np.full_like(feed[TIME_IDS], 16)}
    assert np.abs(engine.run(feed)["clean"] - engine.run(other)["clean"]).max() > 1e-4


def test_on_a_device_no_value_is_read_back_at_any_size(exported: Exported) -> None:
    """On a device without values, reading one raises; lengths are computed on the CPU."""
    model = onnx.load(str(exported.file))
    module = fused_module(model, "bfloat16", "meta")
    kinds = {node.op_type for node in model.graph.node}
    assert "Attention" in kinds
    assert "Softmax" not in kinds
    for index, size in enumerate(exported.sizes.sizes):
        feed = {name: torch.from_numpy(array).to("meta") for name, array in exported.feed(index).items()}
        shapes = {tuple(tensor.shape) for tensor in module(feed).values()}
        assert shapes == {(4, *exported.sizes.shape(size))}


def test_a_larger_size_takes_more_arithmetic(exported: Exported) -> None:
    shapes = row_shapes(exported.spec, exported.sizes.sizes)
    square, wide, _ = (product_flops(exported.file, each) for each in shapes)
    assert 1.3 * square < wide < 2.3 * square


@pytest.mark.long
def test_tensorrt_compiles_a_profile_for_every_size(exported: Exported) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    network = Network(trt, exported.file, exported.spec)
    assert {tensor.name: tensor.shape for tensor in network.inputs()} == {
        tensor.name: tensor.shape for tensor in exported.spec.inputs
    }
    one, three = (
        len(network.build((1, 2), sizes, for_this_gpu=False).plan)
        for sizes in (exported.sizes.sizes[:1], exported.sizes.sizes)
    )
    assert three > one > 1000
    with pytest.raises(ValueError, match="say which sizes"):
        network.build((1, 2), for_this_gpu=False)


def test_sizes_are_read_in_order() -> None:
    read = sizes_of(["768x512", "512x512"], (4, 64, 64), 8, 3)
    assert [str(size) for size in read.sizes] == ["768x512", "512x512"]
    assert (read.sizes[0].latent_width, read.sizes[0].latent_height) == (96, 64)
    assert read.axes == (-1, -1)
    alone = sizes_of([], (4, 64, 64), 8, 3)
    assert (alone.axes, alone.traced, [str(size) for size in alone.sizes]) == ((64, 64), None, ["512x512"])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["512"], "'512' is no size such as 512x768"),
        (["0x64"], "is no size"),
        (["512x500"], "512x500 does not fit these networks; use multiples of 64 pixels"),
        (["512x512", "512x512"], "each once"),
        ([f"{64 * i}x64" for i in range(1, 18)], "at most 16 sizes"),
    ],
)
def test_what_is_no_size_of_the_networks_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        sizes_of(texts, (4, 64, 64), 8, 3)
