"""Fixtures shared by all tests of the server: toy models made once a session."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path

# Tiny networks only wait for their threads, and equal bytes need equal threads, in child processes too.
os.environ["OMP_NUM_THREADS"] = "1"  # read once, by the first import of torch

import pytest
import structlog

from tests.support.toy_bundle import ToyOptions, make_toy_bundle

# structlog prints to sys.stdout where nobody configured it, and print() does not survive that a capturing test puts
# another file there meanwhile: it is the interpreter that ends. The descriptor stays whatever is put behind it.
structlog.configure(
    logger_factory=structlog.WriteLoggerFactory(open(2, "w", buffering=1, closefd=False)),  # noqa: SIM115
    wrapper_class=structlog.make_filtering_bound_logger("warning"),
)


@pytest.fixture(autouse=True, scope="module")
def what_stays_is_no_garbage() -> None:
    """A job collects garbage after each phase; walking what imports and earlier modules left took most of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def logs_put_back() -> Iterator[None]:
    """Commands that are run in this process configure its logs, into files that are closed when they have ended."""
    root = logging.getLogger()
    handlers, level, configuration = root.handlers[:], root.level, structlog.get_config()
    yield
    structlog.configure(**configuration)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small and quick; stochastic at 4 steps too."""
    path = tmp_path_factory.mktemp("bundles") / "toy"
    return make_toy_bundle(path, ToyOptions(stochastic=(4,))).path


@pytest.fixture(scope="session")
def poison_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As quick, but the six is NaN."""
    path = tmp_path_factory.mktemp("bundles") / "poison"
    return make_toy_bundle(path, ToyOptions(name="toy-poison", nan_class=6, shared=True)).path


@pytest.fixture(scope="session")
def sized_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three sizes: square, wide and high; one step graph."""
    path = tmp_path_factory.mktemp("bundles") / "sized"
    options = ToyOptions(name="toy-sized", shared=True, sizes=((64, 64), (96, 64), (64, 128)))
    return make_toy_bundle(path, options).path


@pytest.fixture(scope="session")
def slow_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps of some 50 ms, so that a busy machine still finds work under way."""
    path = tmp_path_factory.mktemp("bundles") / "slow"
    options = ToyOptions(name="toy-slow", steps=(8,), default_steps=8, channels=192, depth=48)
    return make_toy_bundle(path, options).path
