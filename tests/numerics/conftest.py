"""Fixtures shared by the tests of export."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny_run import tiny_recipe, write_tiny_run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder of untrained networks."""
    return write_tiny_run(tmp_path_factory.mktemp("run") / "tiny", tiny_recipe())
