"""What tests of workers and their engines share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fake_engines import Bench


@pytest.fixture
def bench(toy_bundle: Path) -> Bench:
    return Bench(toy_bundle)
