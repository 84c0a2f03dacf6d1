"""Engines to test: those of a GPU where there is one, and a rehearsal of the same tests on the CPU everywhere.

One command on a machine with a GPU, nothing downloaded: ``python -m pytest tests/gpu -m ""``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.backends.load import BackendName
from engines.bundle import Bundle
from tests.gpu.loading import skip_unless_possible
from tests.support.toy_bundle import ToyOptions, make_toy_bundle

REHEARSAL: BackendName = "onnxruntime"
GPU: tuple[BackendName, ...] = ("tensorrt", "torch-cuda", "torch-inductor")


@pytest.fixture(params=[*(pytest.param(name, marks=pytest.mark.gpu) for name in GPU), REHEARSAL])
def backend(request: pytest.FixtureRequest) -> BackendName:
    name: BackendName = request.param
    if name != REHEARSAL:
        skip_unless_possible(name)
    return name


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A network of some size, and every kind of graph."""
    options = ToyOptions(steps=(2,), default_steps=2, channels=32, depth=4, shared=True, encoders=(2,))
    return make_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle", options)


@pytest.fixture(scope="session")
def unet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step graph with attention, as torch exports it."""
    from tests.support.unet_graph import export_step, small_unet

    file = tmp_path_factory.mktemp("unet") / "step.onnx"
    export_step(small_unet((64, 128)), file)
    return file
