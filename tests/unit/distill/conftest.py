import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="package")
def imports_are_no_garbage() -> Iterator[None]:
    """A job collects garbage after each phase; walking all that torch imports would take most of a short one."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
