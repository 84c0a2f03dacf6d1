"""What tests of workers and their engines share."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.settings import Settings
from tests.support.fake_engines import Bench


@pytest.fixture
def bench(toy_bundle: Path) -> Bench:
    return Bench(toy_bundle)


@pytest.fixture(scope="session")
def settings(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Of an engine process with the toy: the first test measures the costs, the others find them in the cache."""
    cache = tmp_path_factory.mktemp("cache")
    return Settings(bundles=(toy_bundle,), cache_dir=cache, hang_s=3.0, threads=1)
