"""bfloat16 on OpenVINO lowers the network body and nothing else: not w, not the timestep, not the update."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engines.backends import openvino
from engines.backends.onnxruntime import OnnxRuntimeBackend
from engines.backends.openvino import OpenVinoBackend, computed_in, engine_name, has_bfloat16
from engines.manifest import CLEAN_ESTIMATE, COEFFICIENTS, GUIDANCE, TIMESTEP
from tests.support.step_rows import random_rows, step_spec

lowers = pytest.mark.skipif(not has_bfloat16(), reason="OpenVINO computes in float32 on a CPU without bfloat16")
ONLY_NETWORK = np.array([0, 1, 3e38, 0, 1, 0, 0, 0, 0], np.float32)
NO_NETWORK = np.array([0.3, 0, 3e38, -1.7, 0.4, 0, 0.9, 0.6, 0.8], np.float32)


@pytest.fixture(scope="module")
def exact(unet_file: Path) -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(unet_file, step_spec(unet_file))


@pytest.fixture(scope="module")
def lowered(unet_file: Path) -> OpenVinoBackend:
    """In two models; on a CPU without bfloat16 the plugin computes both in float32."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(openvino, "has_bfloat16", lambda: True)
        return OpenVinoBackend(unet_file, step_spec(unet_file), precision="bfloat16")


def error(engine: OpenVinoBackend, exact: OnnxRuntimeBackend, w: float, timestep: float) -> float:
    rows = random_rows(8, seed=1)
    rows[GUIDANCE].fill(w)
    rows[TIMESTEP].fill(timestep)
    rows[COEFFICIENTS][:] = ONLY_NETWORK
    return float(np.abs(engine.run(rows)[CLEAN_ESTIMATE] - exact.run(rows)[CLEAN_ESTIMATE]).mean())


@pytest.mark.parametrize("timestep", [3, 499, 999])
@pytest.mark.parametrize("w", [0.5, 14.0])
def test_the_error_does_not_grow_with_w_or_the_timestep(
    lowered: OpenVinoBackend, exact: OnnxRuntimeBackend, w: float, timestep: float
) -> None:
    # At w = 0 every sinusoid argument is 0, exact in bfloat16: that error is the body's alone.
    floor = error(lowered, exact, 0.0, 0.0)
    assert error(lowered, exact, w, timestep) < 1.5 * floor


@lowers
def test_w_as_a_bfloat16_number_would_be_seen(
    unet_file: Path, exact: OnnxRuntimeBackend, lowered: OpenVinoBackend
) -> None:
    """The teeth of the test above: the same graph unsplit is several times worse."""
    rows = random_rows(8, seed=1)
    rows[GUIDANCE].fill(14.0)
    rows[TIMESTEP].fill(999)
    rows[COEFFICIENTS][:] = ONLY_NETWORK
    unsplit = OpenVinoBackend(unet_file, step_spec(unet_file), precision="bfloat16", static=True)
    wrong = np.abs(unsplit.run(rows)[CLEAN_ESTIMATE] - exact.run(rows)[CLEAN_ESTIMATE]).mean()
    assert wrong > 4 * error(lowered, exact, 14.0, 999)


@pytest.fixture
def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino, "has_bfloat16", lambda: False)
    openvino._tell_without_bfloat16.cache_clear()


@pytest.mark.usefixtures("without_bfloat16")
def test_without_bfloat16_an_engine_is_a_float32_one_and_says_so(unet_file: Path) -> None:
    asked, exact = (OpenVinoBackend(unet_file, step_spec(unet_file), precision=p) for p in ("bfloat16", "float32"))
    assert asked.name == exact.name == engine_name("bfloat16")
    assert asked.name.endswith(" float32")
    rows = random_rows(2, seed=7)
    expected = exact.run(rows)
    assert all(array.tobytes() == expected[name].tobytes() for name, array in asked.run(rows).items())


def test_an_engine_is_named_after_what_the_plugin_computes_in(unet_file: Path) -> None:
    """On this CPU, whether it has bfloat16 or not."""
    engine = OpenVinoBackend(unet_file, step_spec(unet_file), precision="bfloat16")
    rows = random_rows(1, seed=8)
    engine.run(rows)
    request = engine._body or next(iter(engine._requests.values()))
    hint = request.get_compiled_model().get_property("INFERENCE_PRECISION_HINT").get_type_name()
    assert engine.name.split()[-1] == {"f32": "float32", "bf16": "bfloat16"}[hint]


@pytest.mark.usefixtures("without_bfloat16")
def test_a_cpu_without_bfloat16_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    assert [computed_in(p) for p in ("float32", "bfloat16", "bfloat16")] == ["float32"] * 3
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["this CPU has no bfloat16"]


def test_a_cpu_with_bfloat16_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(openvino, "has_bfloat16", lambda: True)
    assert [computed_in(p) for p in ("float32", "bfloat16")] == ["float32", "bfloat16"]
    assert engine_name("bfloat16").endswith(" bfloat16")
    assert not caplog.records


def test_latent_update_and_blend_stay_float32(lowered: OpenVinoBackend, exact: OnnxRuntimeBackend) -> None:
    rows = random_rows(8, seed=2)
    rows[COEFFICIENTS][:] = NO_NETWORK
    expected = exact.run(rows)
    for name, array in lowered.run(rows).items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-6)


def test_lowered_rows_are_bit_equal_in_any_batch(lowered: OpenVinoBackend) -> None:
    rows = random_rows(16, seed=3)
    whole = lowered.run(rows)
    for order in ([0], [9, 4], list(range(8)), list(range(15, -1, -1))):
        part = lowered.run({name: array[order] for name, array in rows.items()})
        assert all(array.tobytes() == whole[name][order].tobytes() for name, array in part.items()), order


def test_a_large_graph_keeps_its_batch_free_and_agrees(unet_file: Path, exact: OnnxRuntimeBackend) -> None:
    free = OpenVinoBackend(unet_file, step_spec(unet_file), static=False)
    rows = random_rows(3, seed=4)
    expected = exact.run(rows)
    for name, array in free.run(rows).items():
        np.testing.assert_allclose(array, expected[name], atol=1e-5)


def test_compiled_models_from_the_cache_give_the_same_bytes(unet_file: Path, tmp_path: Path) -> None:
    spec, rows = step_spec(unet_file), random_rows(4, seed=5)
    fresh = OpenVinoBackend(unet_file, spec, cache_dir=tmp_path).run(rows)
    assert list(tmp_path.rglob("*.blob"))
    again = OpenVinoBackend(unet_file, spec, cache_dir=tmp_path).run(rows)
    assert all(array.tobytes() == again[name].tobytes() for name, array in fresh.items())


def test_a_damaged_compiled_model_is_compiled_again(unet_file: Path, tmp_path: Path) -> None:
    spec, rows = step_spec(unet_file), random_rows(1, seed=6)
    fresh = OpenVinoBackend(unet_file, spec, cache_dir=tmp_path).run(rows)
    for blob in tmp_path.rglob("*.blob"):
        blob.write_bytes(blob.read_bytes()[: blob.stat().st_size // 2])
    again = OpenVinoBackend(unet_file, spec, cache_dir=tmp_path).run(rows)
    assert all(array.tobytes() == again[name].tobytes() for name, array in fresh.items())
