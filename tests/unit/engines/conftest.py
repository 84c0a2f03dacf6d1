"""One toy bundle, and one small UNet's step graph as torch exports it, for all tests of engines."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from engines.bundle import Bundle
from tests.support.made_once import made_once
from tests.support.toy_bundle import ToyOptions, make_toy_bundle


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A toy bundle with deterministic and stochastic students; do not write to it."""
    return make_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle", ToyOptions(stochastic=(4,)))


@pytest.fixture(scope="session")
def unet_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The step graph of a small random UNet2DConditionModel, exported by torch."""
    return made_once(tmp_path_factory, "unet/step.onnx", _export)


def _export(file: Path) -> None:
    from tests.support.unet_graph import export_step, small_unet

    export_step(small_unet(), file)


@pytest.fixture(scope="session")
def trt() -> ModuleType:
    """What compiles for GPUs without one."""
    module: ModuleType = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    return module
