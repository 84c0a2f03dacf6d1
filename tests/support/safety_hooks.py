"""A safety check for tests that goes by the prompt, and remembers what it was given."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

release = threading.Event()
"""Lets the calls go that hang."""

NOT_CALLABLE = 1


def check(images: list[np.ndarray], prompt: str) -> list[Any]:
    """six: all are withheld, seven: the first of them; eight never ends; nine raises; three answers nonsense."""
    if prompt == "eight":
        release.wait()
    if prompt == "nine":
        raise RuntimeError(f"no answer for {prompt}")
    if prompt == "three":
        return [None] * len(images)
    assert all(image.dtype == np.uint8 and image.ndim == 3 and not image.flags.writeable for image in images)
    return [prompt == "six" or (prompt == "seven" and k == 0) for k in range(len(images))]
