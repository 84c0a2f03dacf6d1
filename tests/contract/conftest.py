from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from server.auth import Keyring
from server.service import Service
from server.settings import Settings
from tests.contract.asking import Serve
from tests.contract.job_store_labs import LABS
from tests.contract.lab import Lab
from tests.support.offline import offline_service


@pytest.fixture(params=sorted(LABS))
async def lab(request: pytest.FixtureRequest) -> AsyncIterator[Lab]:
    async with LABS[request.param]() as made:
        yield made


@pytest.fixture
def serve(lab: Lab, toy_bundle: Path) -> Serve:
    def make(keyring: Keyring | None = None, **settings: Any) -> Service:
        return offline_service(toy_bundle, Settings(**settings), keyring, lab.store)

    return make
