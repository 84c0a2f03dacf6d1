"""Int8: which products are lowered, what is written, and who runs it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from engines.backends.load import load_backend
from engines.backends.openvino import OpenVinoBackend
from engines.bundle import Bundle, file_records, verify_bundle, write_bundle
from engines.calibration import BATCH, record_trajectories
from engines.cli import app
from engines.compare import compare_backends
from engines.condition import load_tokenizer
from engines.errors import BackendError, BundleError
from engines.examples import example_inputs
from engines.guidance import weight_from_scale
from engines.int8_graph import PRODUCTS, body_products, quantize_graph
from engines.manifest import CLEAN_ESTIMATE, GUIDANCE, LATENT, MANIFEST_NAME, SEAL_NAME, TIMESTEP
from engines.quantize import NOT_EVALUATED, Int8Options, _held_out, quantize_bundle
from tests.support.toy_bundle import ToyOptions, make_toy_bundle

pytest.importorskip("nncf", reason="int8 needs halfstep[int8]")

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def lowered(toy: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The toy in int8, as the command makes it."""
    folder = tmp_path_factory.mktemp("int8") / "small"
    result = CliRunner().invoke(app, ["quantize", str(toy.path), str(folder), "--batches", "2", "--name", "small"])
    assert result.exit_code == 0, result.output
    assert "int8 against the float32 graph" in result.stdout
    return verify_bundle(folder)


@pytest.fixture(scope="module")
def digits() -> Bundle:
    """The bundle of digits: step graphs of a small stock UNet."""
    return verify_bundle(ROOT / "server" / "bundles" / "digits")


def test_first_last_and_embedding_products_stay_float(digits: Bundle) -> None:
    model = onnx.load(digits.graph_file("step_1"))
    for i, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{i}"
    chosen = body_products(model)
    products = [node for node in model.graph.node if node.op_type in PRODUCTS]
    convolutions = [node.name for node in products if node.op_type == "Conv"]
    assert convolutions[0] not in chosen
    assert convolutions[-1] not in chosen
    assert set(convolutions[1:-1]) <= chosen
    weights = {tensor.name for tensor in model.graph.initializer}
    for node in products:
        if any("time_emb" in name for name in node.input) or not weights & set(node.input):
            assert node.name not in chosen, "of the embedding, or of two activations"


def test_a_network_in_int8_is_near_and_its_rows_bit_equal(digits: Bundle, tmp_path: Path) -> None:
    spec, original = digits.manifest.graphs["step_1"], digits.graph_file("step_1")
    tokenizer = load_tokenizer(digits)
    seen, others, rows = (example_inputs(digits.manifest, tokenizer, "step_1", 8, seed) for seed in range(3))
    file = tmp_path / "int8.onnx"
    onnx.save(quantize_graph(onnx.load(original), [seen, others], original.parent), file)
    assert file.stat().st_size < 0.5 * original.stat().st_size
    engine = OpenVinoBackend(file, spec.model_copy(update={"dtype": "int8"}))
    assert engine.name.endswith(" int8")
    got, want = engine.run(rows), OpenVinoBackend(original, spec).run(rows)
    for name in want:
        error = np.sqrt(np.mean((got[name] - want[name]) ** 2))
        assert 0 < error < 0.1 * want[name].std()
    alone = engine.run({name: array[3:4] for name, array in rows.items()})
    for name, array in got.items():
        assert alone[name].tobytes() == array[3:4].tobytes()


def test_trajectories_visit_every_step_and_the_range_of_guidance(toy: Bundle) -> None:
    recorded = record_trajectories(toy, 2, seed=0)
    assert set(recorded) == {student.graph for student in toy.manifest.students}
    for graph, calls in recorded.items():
        served = [s for s in toy.manifest.students if s.graph == graph]
        assert len(calls.inputs) == len(calls.outputs) == 2 * sum(s.steps for s in served)
        seen = {int(t) for inputs in calls.inputs for t in inputs[TIMESTEP]}
        assert seen == {t for s in served for t in s.timesteps}
        w = np.concatenate([inputs[GUIDANCE] for inputs in calls.inputs])
        assert weight_from_scale(toy.manifest.guidance.min) <= w.min() < w.max()
        assert w.max() <= weight_from_scale(toy.manifest.guidance.max)
        assert all(len(inputs[TIMESTEP]) == BATCH for inputs in calls.inputs)


def test_the_int8_bundle_says_what_it_is(lowered: Bundle) -> None:
    manifest = lowered.manifest
    assert manifest.name == "small"
    assert manifest.in_int8
    assert (manifest.evaluation.metric, manifest.evaluation.rows) == (NOT_EVALUATED, ())
    steps = {student.graph for student in manifest.students}
    for name, spec in manifest.graphs.items():
        assert spec.dtype == ("int8" if name in steps else "float32")
        if name in steps:
            assert spec.rounded is None
            assert 0 < spec.parity.mean_abs_error <= spec.parity.max_abs_error
            assert spec.parity.rows > 0


@pytest.mark.parametrize(("backend", "precision"), [("torch", "auto"), ("openvino", "bfloat16")])
def test_who_cannot_run_it_says_so(lowered: Bundle, backend: str, precision: str) -> None:
    graph = lowered.manifest.students[0].graph
    with pytest.raises(BackendError, match="int8"):
        load_backend(backend, lowered, graph, precision=precision)  # type: ignore[arg-type]


def test_only_backends_that_run_it_are_compared_unless_named(lowered: Bundle) -> None:
    assert {d.engine.split()[0] for d in compare_backends(lowered, None, "auto", 2, 0, rungs=(1, 2))} == {
        "openvino",
        "onnxruntime",
    }
    with pytest.raises(BackendError, match="int8"):
        compare_backends(lowered, ["torch"], "auto", 2, 0)


@pytest.mark.parametrize("nameless", [Path(), Path("/")], ids=str)
def test_a_bundle_takes_the_place_of_no_folder_without_a_name(toy: Bundle, nameless: Path) -> None:
    with pytest.raises(BundleError, match="give the bundle a folder with a name"):
        quantize_bundle(toy, nameless)


def test_a_bad_name_is_refused_before_anything_is_drawn(toy: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="'Big One' is no name of a bundle"):
        quantize_bundle(toy, tmp_path / "named", Int8Options(name="Big One"))
    assert not (tmp_path / "named").exists()


def test_int8_is_made_from_float32_only(lowered: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is int8; int8 is made from float32"):
        quantize_bundle(lowered, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def with_weights_beside(bundle: Bundle, destination: Path) -> Bundle:
    """The bundle with the weights of its one step graph in a file of their own."""
    staging = Path(shutil.copytree(bundle.path, destination.with_suffix(".staging")))
    file = str(staging / "step_1.onnx")
    onnx.save_model(onnx.load(file), file, save_as_external_data=True, location="step_1.onnx.data")
    for name in (MANIFEST_NAME, SEAL_NAME):
        (staging / name).unlink()
    return write_bundle(staging, destination, bundle.manifest.model_copy(update={"files": file_records(staging)}))


def test_a_graph_with_its_weights_beside_it_becomes_the_same_int8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_toy_bundle(tmp_path / "whole", ToyOptions(steps=(1,), default_steps=1, channels=16))
    options = Int8Options(batches=2)
    inside = quantize_bundle(whole, tmp_path / "inside", options)
    monkeypatch.setattr("engines.quantize.INLINE_LIMIT_BYTES", 64)
    beside = quantize_bundle(with_weights_beside(whole, tmp_path / "split"), tmp_path / "beside", options)
    assert verify_bundle(beside.path).data_files["step_1.onnx"] == ("step_1.onnx.data",)
    assert inside.data_files["step_1.onnx"] == ()
    one, other = (onnx.load(bundle.graph_file("step_1")).graph for bundle in (inside, beside))
    assert one.node == other.node
    weights = [
        {w.name: onnx.numpy_helper.to_array(w).tobytes() for w in graph.initializer} for graph in (one, other)
    ]
    assert weights[0] == weights[1]
    assert beside.manifest.graphs["step_1"] == inside.manifest.graphs["step_1"]


@pytest.mark.parametrize("batches", [2, 16])
def test_every_step_is_calibrated_and_every_step_measured(tmp_path: Path, batches: int) -> None:
    """Of a student of 8 steps, too: one call in eight would always be the same step of it."""
    options = ToyOptions(steps=(8, 2), default_steps=2, sizes=((64, 64), (96, 64)) if batches > 2 else ((64, 64),))
    bundle = make_toy_bundle(tmp_path / "toy", options)
    for graph, calls in record_trajectories(bundle, batches, seed=0).items():
        kept = _held_out(calls)
        steps = [float(rows[TIMESTEP][0]) for rows in calls.inputs]
        shapes = [rows[LATENT].shape for rows in calls.inputs]
        everything = set(zip(steps, shapes, strict=True))
        assert {(steps[i], shapes[i]) for i in kept} == everything, graph
        assert {(steps[i], shapes[i]) for i in range(len(steps)) if i not in kept} == everything, graph
        assert len(kept) <= len(steps) / 2


def test_several_sizes_are_calibrated_and_held_out(tmp_path: Path) -> None:
    options = ToyOptions(steps=(2,), default_steps=2, sizes=((64, 64), (96, 64)))
    bundle = make_toy_bundle(tmp_path / "sized", options)
    made = quantize_bundle(bundle, tmp_path / "int8", Int8Options(batches=2))
    spec = made.manifest.graphs["step_2"]
    steps_of_one_batch_each = 2 * len(bundle.manifest.sizes)
    assert (spec.dtype, spec.parity.rows) == ("int8", steps_of_one_batch_each * BATCH)
    assert spec.parity_by_size == {}
    assert made.path.stat().st_mode & 0o777 == 0o755, "a server that runs as somebody else reads it"
    engine, reference = load_backend("auto", made, "step_2"), load_backend("auto", bundle, "step_2")
    errors = []
    for size in bundle.manifest.sizes:  # of many rows: the error of one is up to a hundred times another's
        rows = example_inputs(bundle.manifest, load_tokenizer(bundle), "step_2", 128, size=size)
        got, expected = engine.run(rows)[CLEAN_ESTIMATE], reference.run(rows)[CLEAN_ESTIMATE]
        errors.append(np.abs(got - expected).mean() / np.abs(expected).mean())
    assert 0 < max(errors) < 2 * min(errors), "one size is as good as the other"
