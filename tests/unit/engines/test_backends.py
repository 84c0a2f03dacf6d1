"""Every backend computes the same step, row by row, whatever the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engines.backends.base import EngineBackend
from engines.backends.load import BACKENDS, load_backend
from engines.backends.onnxruntime import OnnxRuntimeBackend
from engines.backends.openvino import OpenVinoBackend
from engines.backends.torch import TorchBackend
from engines.bundle import Bundle
from engines.errors import BackendError
from engines.manifest import CLEAN_ESTIMATE, COEFFICIENTS, KNOWN, LATENT, MASK, NEXT_LATENT, NOISE, GraphSpec
from tests.support.step_rows import random_rows, step_spec

Arrays = dict[str, NDArray[Any]]

STEP = "step_4"


@pytest.fixture(scope="module", params=BACKENDS)
def engine(request: pytest.FixtureRequest, toy: Bundle) -> EngineBackend:
    return load_backend(request.param, toy, STEP)


def load_unet(name: str, file: Path) -> EngineBackend:
    kinds: dict[str, Any] = {"openvino": OpenVinoBackend, "onnxruntime": OnnxRuntimeBackend, "torch": TorchBackend}
    made: EngineBackend = kinds[name](file, step_spec(file))
    return made


def reference_update(rows: Arrays, out: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The update of engines.sampler's docstring, in float64: (next latent, clean), both (B, C, h, w)."""
    p, q, r, a, b, d, c, e, f = rows[COEFFICIENTS].astype(np.float64).T[:, :, None, None, None]
    x, noise, known, mask = (rows[name].astype(np.float64) for name in (LATENT, NOISE, KNOWN, MASK))
    clean = np.clip(p * x + q * out, -r, r)
    y = a * x + b * clean + d * out + c * noise
    return mask * y + (1 - mask) * (e * known + f * noise), clean


def network_output(engine: EngineBackend, rows: Arrays) -> NDArray[np.float64]:
    """What the network gave: with q = 1, no clip and all else 0, the clean estimate is it."""
    only_out = np.tile(np.array([0, 1, 3e38, 0, 0, 0, 0, 0, 0], np.float32), (len(rows[LATENT]), 1))
    return engine.run({**rows, COEFFICIENTS: only_out})[CLEAN_ESTIMATE].astype(np.float64)


@pytest.mark.parametrize("r", [3e38, 1.0, 0.25])
def test_the_update_is_the_samplers(engine: EngineBackend, r: float) -> None:
    rows = random_rows(5, seed=1)
    rows[COEFFICIENTS] = np.random.default_rng(2).standard_normal((5, 9)).astype(np.float32)
    rows[COEFFICIENTS][:, 2] = r
    next_latent, clean = reference_update(rows, network_output(engine, rows))
    got = engine.run(rows)
    np.testing.assert_allclose(got[NEXT_LATENT], next_latent, atol=1e-5)
    np.testing.assert_allclose(got[CLEAN_ESTIMATE], clean, atol=1e-5)


def test_backends_agree_on_the_toy_step(toy: Bundle, engine: EngineBackend) -> None:
    rows = random_rows(6, seed=3)
    expected = load_backend("onnxruntime", toy, STEP).run(rows)
    for name, array in engine.run(rows).items():
        np.testing.assert_allclose(array, expected[name], atol=1e-5)


@pytest.mark.parametrize("name", ["openvino", "torch"])
def test_backends_agree_on_an_exported_unet(unet_file: Path, name: str) -> None:
    rows = random_rows(3, seed=4)
    expected = load_unet("onnxruntime", unet_file).run(rows)
    for output, array in load_unet(name, unet_file).run(rows).items():
        np.testing.assert_allclose(array, expected[output], atol=1e-5)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_unet_rows_are_bit_equal_in_any_batch(unet_file: Path, name: str) -> None:
    unet = load_unet(name, unet_file)
    rows = random_rows(16, seed=5)
    whole = unet.run(rows)
    for order in ([0], [15], [3, 9], [7, 2, 11, 4], list(range(8)), list(range(15, -1, -1))):
        part = unet.run({key: array[order] for key, array in rows.items()})
        for output, array in part.items():
            assert array.tobytes() == whole[output][order].tobytes(), (order, output)


def test_torch_rows_agree_in_any_batch(unet_file: Path) -> None:
    """Not to the bit: its convolutions choose their algorithm by batch size and threads."""
    unet = load_unet("torch", unet_file)
    rows = random_rows(16, seed=5)
    whole = unet.run(rows)
    for order in ([0], [3, 9], list(range(15, -1, -1))):
        part = unet.run({key: array[order] for key, array in rows.items()})
        for output, array in part.items():
            np.testing.assert_allclose(array, whole[output][order], atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(order=st.lists(st.integers(0, 7), min_size=1, max_size=8))
def test_toy_rows_are_bit_equal_in_any_company(engine: EngineBackend, order: list[int]) -> None:
    rows = random_rows(8, seed=6)
    whole = engine.run(rows)
    for output, array in engine.run({key: array[order] for key, array in rows.items()}).items():
        assert array.tobytes() == whole[output][order].tobytes()


def test_outputs_belong_to_the_caller(engine: EngineBackend) -> None:
    first_rows, second_rows = random_rows(2, seed=7), random_rows(2, seed=8)
    first = engine.run(first_rows)
    kept = {name: array.copy() for name, array in first.items()}
    for array in first_rows.values():
        array.fill(0)
    engine.run(second_rows)
    for name, array in first.items():
        np.testing.assert_array_equal(array, kept[name])
        assert array.flags.writeable


def test_a_closed_engine_says_so(toy: Bundle, engine: EngineBackend) -> None:
    closed = load_backend(engine.name.split()[0], toy, STEP)
    closed.close()
    closed.close()
    with pytest.raises(BackendError, match="load it again"):
        closed.run(random_rows(1, seed=0))


def test_a_wrong_shape_is_a_backend_error(engine: EngineBackend) -> None:
    rows = random_rows(2, seed=0)
    rows[LATENT] = rows[LATENT][:, :, :3]
    with pytest.raises(BackendError, match=r"failed on step_4\.onnx"):
        engine.run(rows)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_file_that_is_no_graph_is_a_backend_error(tmp_path: Path, name: str, unet_file: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"\x00not a graph")
    spec: GraphSpec = step_spec(unet_file)
    kinds: dict[str, Any] = {"openvino": OpenVinoBackend, "onnxruntime": OnnxRuntimeBackend, "torch": TorchBackend}
    with pytest.raises(BackendError, match=r"bad\.onnx"):
        kinds[name](bad, spec)
