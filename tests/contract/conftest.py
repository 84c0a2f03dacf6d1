from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.contract.job_store_labs import LABS
from tests.contract.lab import Lab


@pytest.fixture(params=sorted(LABS))
async def lab(request: pytest.FixtureRequest) -> AsyncIterator[Lab]:
    async with LABS[request.param]() as made:
        yield made
