"""Modules that differ in their weights alone are traced once, and their files are those of a trace of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from distill_jobs import traces
from distill_jobs.onnx_export import write_graph
from engines.manifest import TensorSpec

INPUTS = (TensorSpec(name="x", dtype="float32", shape=(-1, 4)),)
OUTPUTS = (TensorSpec(name="y", dtype="float32", shape=(-1, 3)),)
ROWS = torch.randn(5, 4, generator=torch.Generator().manual_seed(9))


class Network(nn.Module):
    """Weights, a buffer that no state dict has, and a number that ends up in the graph."""

    offset: Tensor

    def __init__(self, seed: int, width: int = 6, offset: float = 0.5, power: float = 2.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Linear(width, 3))
        self.register_buffer("offset", torch.tensor([offset, 0.0, 1.0]), persistent=False)
        self.power = power

    def forward(self, x: Tensor) -> Tensor:
        return (self.layers(x) + self.offset).abs() ** self.power


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that were traced."""
    seen: list[nn.Module] = []
    export = torch.onnx.export

    def watched(module: nn.Module, *args: object, **options: object) -> object:
        seen.append(module)
        return export(module, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.onnx, "export", watched)
    monkeypatch.setattr(traces, "_kept", type(traces._kept)())
    return seen


def written(module: nn.Module, file: Path) -> bytes:
    """The module's graph, which computes what the module does."""
    write_graph(module, [ROWS[:2]], INPUTS, OUTPUTS, file)
    (got,) = onnxruntime.InferenceSession(str(file)).run(None, {"x": ROWS.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(got, module(ROWS).numpy(), rtol=1e-5, atol=1e-6)
    return file.read_bytes()


def test_the_second_of_one_architecture_is_not_traced(traced: list[nn.Module], tmp_path: Path) -> None:
    first, second = Network(0), Network(1)
    files = [written(module, tmp_path / "x.onnx") for module in (first, second, first)]
    assert traced == [first]
    assert files[0] == files[2] != files[1]
    traces._kept.clear()
    assert written(second, tmp_path / "x.onnx") == files[1]
    assert traced == [first, second]


@pytest.mark.parametrize(
    "other",
    [Network(0, width=7), Network(0, offset=0.25), Network(0, power=3.0)],
    ids=["width", "buffer", "number"],
)
def test_whatever_else_differs_is_traced(other: Network, traced: list[nn.Module], tmp_path: Path) -> None:
    for module in (Network(0), other):
        written(module, tmp_path / "x.onnx")
    assert len(traced) == 2


def test_another_example_and_another_output_are_traced(traced: list[nn.Module], tmp_path: Path) -> None:
    network = Network(0)
    written(network, tmp_path / "x.onnx")
    write_graph(network, [ROWS[:3]], INPUTS, OUTPUTS, tmp_path / "x.onnx")
    write_graph(
        network, [ROWS[:3]], INPUTS, (TensorSpec(name="z", dtype="float32", shape=(-1, 3)),), tmp_path / "x"
    )
    assert len(traced) == 3


def test_networks_that_share_a_weight_are_another_architecture(traced: list[nn.Module], tmp_path: Path) -> None:
    """Of the same shapes as those that do not."""
    tied, free = (Network(0, width=4) for _ in range(2))
    tied.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(2)), nn.Linear(4, 3))
    free.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(2)), nn.Linear(4, 3))
    tied.layers[1].weight = tied.layers[0].weight
    for module in (tied, free):
        written(module, tmp_path / "x.onnx")
    assert traced == [tied, free]


def test_what_pickle_cannot_write_is_traced_every_time(traced: list[nn.Module], tmp_path: Path) -> None:
    network = Network(0)
    network.unpack = lambda: None  # type: ignore[assignment]
    assert written(network, tmp_path / "x.onnx") == written(network, tmp_path / "y.onnx")
    assert len(traced) == 2


def test_what_is_kept_has_no_weights_and_is_little(traced: list[nn.Module], tmp_path: Path) -> None:
    for width in range(1, traces.KEPT + 2):
        written(Network(0, width), tmp_path / "x.onnx")
    assert len(traced) == traces.KEPT + 1
    assert len(traces._kept) == traces.KEPT
    for program in traces._kept.values():
        values = program.model.graph.initializers
        assert all(values[name].const_value is None for name in Network(0).state_dict())
        assert program.exported_program is None
    written(Network(3, 1), tmp_path / "x.onnx")  # the oldest is gone
    assert len(traced) == traces.KEPT + 2
