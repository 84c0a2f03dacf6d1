"""What a GPU has to show: the reference's results, graphs captured, nothing built twice, and a bench that runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from engines.backends.base import Precision
from engines.backends.load import ON_GPU, BackendName, load_backend, load_graph
from engines.backends.onnxruntime import OnnxRuntimeBackend
from engines.backends.tensorrt_build import find_library, is_rtx
from engines.bundle import Bundle
from engines.cli import app
from engines.condition import load_tokenizer
from engines.errors import BackendError
from engines.examples import example_inputs
from engines.manifest import COEFFICIENTS, LATENT
from engines.open import open_pipeline
from tests.gpu.loading import skip_unless_possible
from tests.support.step_rows import random_rows, step_spec
from tests.support.toy_bundle import ToyOptions, make_toy_bundle

RUNGS = (1, 2, 4)


@pytest.mark.parametrize("rows", [1, 3, 4, 9], ids=["a rung", "between two", "the largest", "beyond it"])
def test_every_graph_agrees_with_the_reference(backend: BackendName, toy: Bundle, rows: int) -> None:
    check_calls(backend, toy, rows)


def test_every_size_agrees_with_the_reference(backend: BackendName, tmp_path: Path) -> None:
    options = ToyOptions(steps=(2,), default_steps=2, sizes=((64, 64), (96, 64), (64, 128)))
    check_calls(backend, make_toy_bundle(tmp_path / "sized", options), 3)


def check_calls(backend: BackendName, bundle: Bundle, rows: int) -> None:
    """Every graph, at all of its sizes in one engine."""
    for graph, spec in bundle.manifest.graphs.items():
        engine, reference = (load_backend(name, bundle, graph, rungs=RUNGS) for name in (backend, "onnxruntime"))
        for size in bundle.manifest.sizes if spec.free else bundle.manifest.sizes[:1]:
            inputs = example_inputs(bundle.manifest, load_tokenizer(bundle), graph, rows, size=size)
            got, expected = engine.run(inputs), reference.run(inputs)
            for output in spec.outputs:
                levels = output.dtype == "uint8"
                assert got[output.name].dtype == expected[output.name].dtype
                difference = np.abs(got[output.name].astype(np.float64) - expected[output.name])
                assert difference.max() <= (1 if levels else 1e-3), (graph, size, output.name)
        engine.close()


@pytest.mark.long
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.05), ("float16", 0.01)])
def test_an_exported_unet_agrees_with_the_reference(
    backend: BackendName, unet_file: Path, precision: Precision, tolerance: float
) -> None:
    spec, rows = step_spec(unet_file), random_rows(4, seed=1)
    spec = spec.model_copy(update={"lowered": {"float16": spec.parity}})
    rows[COEFFICIENTS][:] = (0, 1, 3e38, 0, 1, 0, 0, 0, 0)  # the network's own output
    expected = OnnxRuntimeBackend(unet_file, spec).run(rows)
    offered = precision if backend in ON_GPU else "float32"
    engine = load_graph(backend, unet_file, spec, precision=offered, rungs=RUNGS)
    for name, array in engine.run(rows).items():
        assert np.isfinite(array).all()
        assert np.abs(array - expected[name]).max() <= tolerance * np.abs(expected[name]).max()
    if backend in ON_GPU:
        assert engine.name.endswith(precision)


def test_outputs_belong_to_the_caller_and_calls_leave_no_trace(backend: BackendName, toy: Bundle) -> None:
    engine = load_backend(backend, toy, "step", rungs=RUNGS)
    tokenizer = load_tokenizer(toy)
    one, two = (example_inputs(toy.manifest, tokenizer, "step", 2, seed) for seed in (1, 2))
    first = engine.run(one)
    kept = {name: array.copy() for name, array in first.items()}
    engine.run(two)
    again = engine.run(one)
    for name, array in first.items():
        np.testing.assert_array_equal(array, kept[name])
        np.testing.assert_array_equal(array, again[name])


def test_a_wrong_shape_is_refused(backend: BackendName, toy: Bundle) -> None:
    engine = load_backend(backend, toy, "step", rungs=RUNGS)
    inputs = example_inputs(toy.manifest, load_tokenizer(toy), "step", 2)
    inputs[LATENT] = inputs[LATENT][:, :, :3]
    with pytest.raises(BackendError, match=r"failed on step\.onnx"):
        engine.run(inputs)


@pytest.mark.gpu
@pytest.mark.long
@pytest.mark.parametrize("name", ["torch-cuda", "torch-inductor", "tensorrt"])
def test_every_rung_is_a_cuda_graph(name: BackendName, unet_file: Path) -> None:
    skip_unless_possible(name)
    if name == "tensorrt" and is_rtx(find_library()):
        pytest.skip("tensorrt_rtx captures its graphs itself and does not tell")
    engine: Any = load_graph(name, unet_file, step_spec(unet_file), rungs=RUNGS)
    for rung in RUNGS:
        engine.run(random_rows(rung, seed=0))
    assert engine.captured == dict.fromkeys(RUNGS, True)


def test_a_second_start_builds_nothing(
    backend: BackendName, toy: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = example_inputs(toy.manifest, load_tokenizer(toy), "step", 2)
    first = load_backend(backend, toy, "step", cache_dir=tmp_path, rungs=RUNGS).run(inputs)
    if backend == "tensorrt":
        from engines.backends import tensorrt

        monkeypatch.setattr(tensorrt, "build_plan", lambda *_: pytest.fail("built again"))
    if backend == "torch-inductor":
        from engines.backends import torch_inductor

        monkeypatch.setattr(torch_inductor, "compile_program", lambda *_: pytest.fail("compiled again"))
    second = load_backend(backend, toy, "step", cache_dir=tmp_path, rungs=RUNGS).run(inputs)
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


def test_a_pipeline_draws_what_the_reference_draws(backend: BackendName, toy: Bundle) -> None:
    images = []
    for name in (backend, "onnxruntime"):
        pipeline = open_pipeline(toy.path, name, rungs=RUNGS)
        images.append(pipeline.generate(["seven", "three", "one"], 3.0, [1, 2, 3]).astype(int))
        pipeline.close()
    assert np.abs(images[0] - images[1]).max() <= 1


def test_the_bench_ends_with_one_json_line(backend: BackendName, toy: Bundle) -> None:
    arguments = ["bench", str(toy.path), "--backend", backend, "--rungs", "1,2", "--repeats", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["engine"].startswith(backend)
    assert figures["generate"]["images_per_s"] > 0
    if backend in ON_GPU:
        assert " sm_" in figures["machine"]
        assert figures["device_memory_mb"] > 0


@pytest.mark.long
def test_the_bench_of_real_architectures_runs(backend: BackendName, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.gpu.bench import main

    precision: Precision = "bfloat16" if backend in ON_GPU else "float32"
    main("tiny", [backend], precision, "1,2", 1, compiled=False)
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["step_tflop"] > 0
    assert figures["failures"] == {}
    assert len(figures["ms"]) == len(figures["images_per_s"]) == 2
    assert (figures["device_mb"] is not None) == (backend in ON_GPU)
    for contender, ms in figures["ms"].items():
        assert ms.keys() == {"step", "decode", "decode_tiny"}
        for decode, rates in figures["images_per_s"][contender].items():
            for rung, rate in rates.items():
                assert rate * (4 * ms["step"][rung] + ms[decode][rung]) == pytest.approx(1e3 * int(rung))
