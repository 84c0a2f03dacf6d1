"""Whether there is a GPU for a backend."""

from __future__ import annotations

import pytest

from engines.backends.cuda import find_device
from engines.backends.load import BackendName
from engines.backends.tensorrt_build import check_target, find_library
from engines.errors import BackendError


def skip_unless_possible(name: BackendName) -> None:
    """Skip with the reason that a user would be given."""
    try:
        device = find_device()
        if name == "tensorrt":
            check_target(find_library(), device)
    except BackendError as reason:
        pytest.skip(str(reason))
