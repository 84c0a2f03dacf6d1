"""What the ``generate`` command was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.errors import HalfstepError

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


class GenerateError(HalfstepError):
    """It was not drawn; the message says why."""


@dataclass(frozen=True)
class Wish:
    """fields: of the API's body, those given; image, mask: files, or None."""

    fields: dict[str, Any]
    image: Path | None = None
    mask: Path | None = None
