"""A bundle of several sizes: what its manifest may say, and engines, costs and rows that follow the size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from engines.backends import openvino
from engines.backends.base import EngineBackend
from engines.backends.load import BACKENDS, engine_key, load_backend
from engines.backends.plan_store import PlanStore
from engines.backends.torch_cuda import TorchCudaBackend
from engines.bundle import Bundle
from engines.calls import calls
from engines.compare import compare_backends
from engines.condition import load_tokenizer
from engines.errors import BackendError
from engines.examples import example_inputs
from engines.manifest import BundleManifest
from engines.open import kept_costs, open_pipeline
from tests.support.toy_bundle import ToyOptions, make_toy_bundle

SIZES = ((64, 64), (96, 64), (64, 128))


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    options = ToyOptions(steps=(2,), default_steps=2, sizes=SIZES)
    return make_toy_bundle(tmp_path_factory.mktemp("sized") / "bundle", options)


def test_what_is_called_is_every_graph_at_every_size(sized: Bundle, toy: Bundle) -> None:
    named = [str(call) for call in calls(sized.manifest)]
    assert named == ["condition", *(f"{g}@{w}x{h}" for g in ("decode", "encode", "step_2") for w, h in SIZES)]
    assert [str(call) for call in calls(toy.manifest)] == list(toy.manifest.graphs)


def test_all_backends_agree_on_every_size(sized: Bundle) -> None:
    differences = compare_backends(sized, None, "auto", 5, 0)
    assert {d.call for d in differences} == {str(call) for call in calls(sized.manifest)}
    assert {d.engine.split()[0] for d in differences} == set(BACKENDS)
    assert [d for d in differences if not d.within(1e-4)] == []


def test_an_engine_is_compared_on_all_sizes_before_the_next_is_loaded(
    sized: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[str, str]] = []

    def load(name: str, bundle: Bundle, graph: str, **options: Any) -> EngineBackend:
        loaded.append((name, graph))
        return load_backend(name, bundle, graph, **options)

    monkeypatch.setattr("engines.compare.load_backend", load)
    compare_backends(sized, ["torch"], "auto", 2, 0)
    assert loaded == [(name, graph) for graph in sized.manifest.graphs for name in ("onnxruntime", "torch")]


def test_images_have_the_size_they_were_started_in(sized: Bundle) -> None:
    pipeline = open_pipeline(sized.path, "onnxruntime", rungs=(1, 2), warm=False)
    for size in sized.manifest.sizes:
        [image] = pipeline.generate(["seven"], 2.0, [1], size=size)
        assert image.shape == (size.height, size.width, 3)
    assert pipeline.generate(["seven"], 2.0, [1]).shape == (1, 64, 64, 3)


def test_costs_are_kept_by_size_and_measured_again_for_others(sized: Bundle, tmp_path: Path) -> None:
    opened = open_pipeline(sized.path, "onnxruntime", rungs=(1, 2), cache_dir=tmp_path / "cache")
    assert opened.costs is not None
    assert set(opened.costs.ms) == {str(call) for call in calls(sized.manifest)}

    def kept(bundle: Bundle) -> object:
        return kept_costs(bundle, "onnxruntime", "auto", 0, tmp_path / "cache", (1, 2))

    assert kept(sized) == opened.costs
    options = ToyOptions(steps=(2,), default_steps=2, sizes=SIZES[1:])
    fewer = make_toy_bundle(tmp_path / "fewer", options)
    assert kept(fewer) is not None  # the same graphs at two of the sizes
    more = make_toy_bundle(tmp_path / "more", ToyOptions(steps=(2,), default_steps=2, sizes=(*SIZES, (32, 32))))
    assert kept(more) is None


def test_a_gpus_rows_are_made_ready_by_batch_and_size(sized: Bundle) -> None:
    """Rehearsed on the CPU."""
    spec, file = sized.manifest.graphs["step_2"], sized.graph_file("step_2")
    tokenizer, reference = load_tokenizer(sized), load_backend("onnxruntime", sized, "step_2")
    offered = sized.manifest.sizes[:2]
    engine = TorchCudaBackend(file, spec, rungs=(1, 2), sizes=offered, device="cpu")
    for size in (*offered, *offered):
        rows = example_inputs(sized.manifest, tokenizer, "step_2", 3, size=size)
        expected = reference.run(rows)
        for name, array in engine.run(rows).items():
            np.testing.assert_allclose(array, expected[name], atol=1e-4)
    assert set(engine.captured) == {1, 2}
    other = example_inputs(sized.manifest, tokenizer, "step_2", 1, size=sized.manifest.sizes[2])
    with pytest.raises(BackendError, match=r"rows are of none of the 2 sizes: latent must be .* not .*16, 8"):
        engine.run(other)
    mixed = {**rows, "noise": rows["noise"][:, :, :4]}
    with pytest.raises(BackendError, match="rows are of none of the 2 sizes: noise must be"):
        engine.run(mixed)
    with pytest.raises(ValueError, match="say which sizes"):
        TorchCudaBackend(file, spec, rungs=(1,), device="cpu")


def test_openvino_compiles_once_where_a_model_for_each_size_would_be_too_large(
    sized: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, file = sized.manifest.graphs["step_2"], sized.graph_file("step_2")
    weights = openvino._weight_bytes(openvino._core().read_model(file))
    monkeypatch.setattr(openvino, "MAX_STATIC_BYTES", 2 * weights)
    assert openvino.OpenVinoBackend(file, spec, sizes=2)._static
    assert not openvino.OpenVinoBackend(file, spec, sizes=3)._static


def test_a_plan_is_for_its_sizes_alone(sized: Bundle, tmp_path: Path) -> None:
    key = engine_key(sized, "step_2", "onnxruntime", "auto", 0)
    store, other = (PlanStore(tmp_path, key, (1, 2), sizes) for sizes in (["64x64", "96x64"], ["64x64"]))
    store.save("plan", b"profiles")
    assert store.load("plan") == b"profiles"
    assert other.load("plan") is None
    other.file("plan").write_bytes(store.file("plan").read_bytes())
    assert other.load("plan") is None


# ---- what a manifest may say


def repeated(data: dict[str, Any]) -> None:
    data["sizes"][1] = data["sizes"][0]


def another_scale(data: dict[str, Any]) -> None:
    data["sizes"][1]["width"] = 192


def cut_off(data: dict[str, Any]) -> None:
    data["sizes"][1]["width"] = 100


def fixed_graph(data: dict[str, Any]) -> None:
    for tensor in (*data["graphs"]["decode"]["inputs"], *data["graphs"]["decode"]["outputs"]):
        tensor["shape"] = [8 if length == -1 and axis else length for axis, length in enumerate(tensor["shape"])]


def free_width_alone(data: dict[str, Any]) -> None:
    data["graphs"]["decode"]["inputs"][0]["shape"] = [-1, 1, 8, -1]


def free_tokens(data: dict[str, Any]) -> None:
    data["graphs"]["condition"]["inputs"][0]["shape"] = [-1, -1]


def too_many(data: dict[str, Any]) -> None:
    data["sizes"] = data["sizes"] * 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (repeated, "sizes must be distinct"),
        (another_scale, "the same whole number of pixels"),
        (cut_off, "the same whole number of pixels"),
        (fixed_graph, "graph 'decode' takes one size, and the bundle has 3"),
        (free_width_alone, "leaves more or less free than height and width"),
        (free_tokens, "leaves more or less free than height and width"),
        (too_many, "at most 16"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_sizes_that_do_not_go_together_are_refused(
    sized: Bundle, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    data = sized.manifest.model_dump(mode="json")
    change(data)
    with pytest.raises(ValidationError, match=message):
        BundleManifest.model_validate(data)
