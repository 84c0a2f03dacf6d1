"""One server for all end-to-end tests that do not end it, and one a file whose steps can be held back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from tests.support.live import Live, live
from tests.support.serving import ServerProcess, serving


@pytest.fixture(scope="session")
def server(
    toy_bundle: Path, poison_bundle: Path, slow_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("server") / "stderr.log"
    with serving([toy_bundle, poison_bundle, slow_bundle], log=log) as process:
        yield process


@pytest.fixture
def client(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made


@pytest.fixture
def sdk(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def running(toy_bundle: Path) -> Iterator[Live]:
    with live(toy_bundle) as made:
        yield made


@pytest.fixture
def api(running: Live) -> Iterator[httpx.Client]:
    """A client of ``running``, whose steps go on afterwards."""
    with running.client() as made:
        yield made
    running.bench.allow()
