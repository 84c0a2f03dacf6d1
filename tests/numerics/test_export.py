"""Exported graphs against the torch modules they came from."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from distill_jobs.data.digits import CLASSES, class_condition
from distill_jobs.graphs import ConditionGraph, DecodeGraph, StepGraph
from distill_jobs.onnx_export import ExportError, check_parity, reference_outputs, write_graph
from distill_jobs.parity import (
    FEW_BATCHES,
    PARITY_ROWS,
    parity_batches,
    parity_latents,
    parity_rows,
    write_checked,
)
from engines.manifest import COEFFICIENTS, KNOWN, LATENT, MASK, NOISE, GuidanceRange, TensorSpec
from engines.sampler import Step, sampler_plan
from engines.schedule import NoiseSchedule, ScheduleSpec
from tests.support.tiny_run import tiny_student

SCHEDULE = NoiseSchedule(ScheduleSpec())
RANGE = GuidanceRange(min=1, max=15, default=3)
SHAPE = (1, 8, 8)
SIZE = (8, 8)


def conditions(rows: int) -> torch.Tensor:
    return class_condition(torch.arange(rows) % CLASSES).tokens


@pytest.fixture(scope="module")
def step() -> StepGraph:
    return StepGraph(tiny_student(0)).eval()


@pytest.fixture(scope="module")
def step_file(step: StepGraph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graphs") / "step.onnx"
    rows = parity_rows(sampler_plan(SCHEDULE, 4), RANGE, SHAPE, conditions(32))
    spec = write_checked(step, rows, step.inputs(*SIZE, tokens=1), step.outputs(*SIZE), path, 1e-4)
    assert spec.parity.rows == 32
    assert 0 <= spec.parity.mean_abs_error <= spec.parity.max_abs_error <= 1e-4
    return path


def feed_of(step: StepGraph, rows: list[torch.Tensor]) -> dict[str, np.ndarray]:
    names = [spec.name for spec in step.inputs(*SIZE, tokens=1)]
    return {name: tensor.numpy() for name, tensor in zip(names, rows, strict=True)}


def run_file(path: Path, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feed)


def mixed_rows(n: int, w: list[float]) -> list[torch.Tensor]:
    """Rows of different plans, stochastic and clipped ones included, masks on half of them."""
    steps: list[Step] = []
    for plan in (
        sampler_plan(SCHEDULE, 8),
        sampler_plan(SCHEDULE, 4, "stochastic"),
        sampler_plan(SCHEDULE, 2, clip=1.0),
    ):
        steps.extend(plan)
    rows = parity_rows(sampler_plan(SCHEDULE, 1), RANGE, SHAPE, conditions(n))
    chosen = [steps[i % len(steps)] for i in range(n)]
    rows[1] = torch.tensor([float(s.timestep) for s in chosen])
    rows[2] = torch.tensor([w[i % len(w)] for i in range(n)])
    rows[4] = torch.stack([torch.tensor(s.row) for s in chosen])
    return rows


@pytest.mark.parametrize("batch", [1, 3, 8, 70])
def test_the_step_graph_equals_torch_at_any_batch_and_weight(step: StepGraph, step_file: Path, batch: int) -> None:
    rows = mixed_rows(batch, [0.0, 0.5, 4.0, 14.0])
    with torch.no_grad():
        expected = step(*rows)
    for got, want in zip(run_file(step_file, feed_of(step, rows)), expected, strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-4)


def test_the_graph_holds_the_very_frequencies_of_training(step_file: Path) -> None:
    """At w·1000 their last bit is 1e-3 of an angle."""
    frequencies = torch.exp(torch.arange(128, dtype=torch.float32) * -(math.log(10_000.0) / 127)).numpy()
    tables = [onnx.numpy_helper.to_array(tensor).ravel() for tensor in onnx.load(str(step_file)).graph.initializer]
    assert any(np.array_equal(table, frequencies) for table in tables)


def test_the_weight_matters_in_the_graph(step: StepGraph, step_file: Path) -> None:
    low, high = mixed_rows(4, [0.0]), mixed_rows(4, [14.0])
    one, other = (run_file(step_file, feed_of(step, rows))[1] for rows in (low, high))
    assert np.abs(one - other).max() > 1e-3


def test_a_row_does_not_depend_on_its_companions(step: StepGraph, step_file: Path) -> None:
    feed = feed_of(step, mixed_rows(14, [0.0, 0.5, 4.0, 14.0]))
    together = run_file(step_file, feed)
    for i in range(14):
        alone = run_file(step_file, {name: rows[i : i + 1] for name, rows in feed.items()})
        for one, many in zip(alone, together, strict=True):
            np.testing.assert_allclose(one[0], many[i], rtol=0, atol=1e-5)


def test_the_graphs_update_is_the_rows_update(step: StepGraph, step_file: Path) -> None:
    """With a mask of ones the graph does Step.apply; where the mask is 0 it re-noises the known image."""
    plan = sampler_plan(SCHEDULE, 4, "stochastic")
    rows = mixed_rows(8, [2.0])
    feed = feed_of(step, rows)
    feed[COEFFICIENTS][:] = plan.steps[1].row
    feed["timestep"][:] = plan.steps[1].timestep
    feed[MASK][:] = 0
    feed[MASK][:, :, :4] = 1
    got, clean = run_file(step_file, feed)
    with torch.no_grad():
        torch_clean = step(*(torch.from_numpy(a) for a in feed.values()))[1]
    out = (plan.steps[1].coefficients.p * feed[LATENT] - clean) / -plan.steps[1].coefficients.q
    update, estimate = plan.steps[1].apply(feed[LATENT], out, feed[NOISE])
    alpha, sigma = SCHEDULE.at(plan.steps[1].target)
    np.testing.assert_allclose(clean, torch_clean.numpy(), atol=1e-4)
    np.testing.assert_allclose(clean, estimate, atol=1e-5)
    np.testing.assert_allclose(got[:, :, :4], update[:, :, :4], atol=1e-4)
    known = alpha * feed[KNOWN] + sigma * feed[NOISE]
    np.testing.assert_allclose(got[:, :, 4:], known[:, :, 4:], atol=1e-6)


def test_a_clipped_row_clips_in_the_graph(step: StepGraph, step_file: Path) -> None:
    feed = feed_of(step, mixed_rows(8, [2.0]))
    feed[LATENT] *= 20
    feed[COEFFICIENTS][:] = sampler_plan(SCHEDULE, 2, clip=1.0).steps[1].row
    feed[MASK][:] = 1
    following, clean = run_file(step_file, feed)
    assert np.abs(clean).max() == 1.0
    np.testing.assert_allclose(following, clean, atol=1e-6)


def test_the_file_holds_its_weights_once_and_no_notes(step: StepGraph, step_file: Path) -> None:
    model = onnx.load(str(step_file))
    weights = sum(p.numel() for p in step.parameters()) * 4
    stored = sum(int(np.prod(i.dims)) * 4 for i in model.graph.initializer if i.data_type == onnx.TensorProto.FLOAT)
    assert stored < 1.02 * weights + 8192
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert not model.metadata_props
    assert not model.graph.metadata_props
    content = step_file.read_bytes()
    assert b"/distill_jobs" not in content
    assert b"site-packages" not in content
    assert {o.version for o in model.opset_import if o.domain == ""} == {21}
    onnx.checker.check_model(model)


def test_the_condition_graph_is_the_one_hot_of_training(tmp_path: Path) -> None:
    graph = ConditionGraph(16)
    tokens = torch.arange(32)[:, None] % 10
    spec = write_checked(graph, [tokens], graph.inputs(), graph.outputs(), tmp_path / "c.onnx", 0.0)
    (got,) = run_file(tmp_path / "c.onnx", {"tokens": tokens.numpy()})
    np.testing.assert_array_equal(got, class_condition(tokens[:, 0]).tokens.numpy())
    assert spec.parity.max_abs_error == 0


def test_weights_beyond_the_limit_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8)).requires_grad_(False)
    rows = torch.randn(64, 8)
    specs = [(TensorSpec(name=name, dtype="float32", shape=(-1, 8)),) for name in ("x", "y")]
    write_checked(graph, [rows], *specs, tmp_path / "small.onnx", 1e-5)
    monkeypatch.setattr("distill_jobs.onnx_export.INLINE_LIMIT_BYTES", 1024)
    spec = write_checked(graph, [rows], *specs, tmp_path / "large.onnx", 1e-5, FEW_BATCHES)
    assert spec.parity.rows == sum(FEW_BATCHES)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data", "small.onnx"]
    assert (tmp_path / "large.onnx").stat().st_size < 2 * 64 * 8 * 4
    written = (tmp_path / "large.onnx").read_bytes()
    assert b"site-packages" not in written  # the exporter notes where each layer was made


def test_few_rows_of_large_latents_are_compared() -> None:
    assert sum(parity_batches(16, 16)) == PARITY_ROWS
    assert parity_batches(64, 64) == FEW_BATCHES
    assert len(set(FEW_BATCHES)) > 1  # a batch size baked into the graph must show


def test_decode_repeats_pixels_in_grey(tmp_path: Path) -> None:
    graph = DecodeGraph(channels=1, enlarge=8)
    latents = parity_latents(32, SHAPE)
    write_checked(graph, [latents], graph.inputs(*SIZE), graph.outputs(*SIZE), tmp_path / "d.onnx", 1.0)
    (image,) = run_file(tmp_path / "d.onnx", {LATENT: latents.numpy()})
    assert image.dtype == np.uint8
    assert image.shape == (32, 64, 64, 3)
    levels = np.rint((np.clip(latents.numpy()[:, 0], -1, 1) + 1) * 127.5)
    small = image[:, ::8, ::8]
    assert np.abs(small[..., 0] - levels).max() <= 1
    np.testing.assert_array_equal(image, small.repeat(8, axis=1).repeat(8, axis=2))
    np.testing.assert_array_equal(image[..., 0], image[..., 2])


def test_decode_keeps_colour_and_refuses_what_is_no_image() -> None:
    latent = torch.stack([torch.full((2, 2), value) for value in (-1.0, 0.0, 1.0)])[None]
    image = DecodeGraph(channels=3, enlarge=1)(latent)
    assert image[0, 0, 0].tolist() == [0, 128, 255]
    with pytest.raises(ValueError, match="1 or 3 channels"):
        DecodeGraph(channels=4, enlarge=1)


def test_a_graph_that_differs_or_gives_nan_is_refused(step: StepGraph, step_file: Path) -> None:
    rows = parity_rows(sampler_plan(SCHEDULE, 4), RANGE, SHAPE, conditions(4))
    with pytest.raises(ExportError, match="differs from torch"):
        check_parity(reference_outputs(StepGraph(tiny_student(5)), rows, "x"), step_file, rows, (4,), 1e-4)
    broken = tiny_student(0)
    with torch.no_grad():
        broken.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ExportError, match="NaN"):
        reference_outputs(StepGraph(broken), rows, "x")


def test_tracing_with_a_batch_of_one_is_refused(step: StepGraph, tmp_path: Path) -> None:
    rows = [t[:1] for t in parity_rows(sampler_plan(SCHEDULE, 4), RANGE, SHAPE, conditions(2))]
    with pytest.raises(ValueError, match="at least 2"):
        write_graph(step, rows, step.inputs(*SIZE, tokens=1), step.outputs(*SIZE), tmp_path / "x.onnx")
