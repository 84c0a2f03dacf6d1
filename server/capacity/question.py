"""What a plan asks: a load, and how long its requests may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from engines.errors import HalfstepError

PlannedTask = Literal["text_to_image", "edit", "inpaint", "invert"]
"""A task, or an edit by inversion."""


class PlanError(HalfstepError):
    """The plan asks for what the models or no fleet can do; the message says what."""


@dataclass(frozen=True)
class Mix:
    """Relative shares of what requests ask for, each drawn by itself.

    steps, sizes: None for each model's default; strength: of edits and inpaintings, None for the API's
    defaults; new_prompts: the part whose condition no worker remembers.
    """

    tasks: Mapping[PlannedTask, float] = field(default_factory=lambda: {"text_to_image": 1.0})
    steps: Mapping[int, float] | None = None
    sizes: Mapping[str, float] | None = None
    images: Mapping[int, float] = field(default_factory=lambda: {1: 1.0})
    strength: float | None = None
    new_prompts: float = 1.0


@dataclass(frozen=True)
class Question:
    """rate: requests a second; p99_s: in which 99 % of them are to have their files.

    cost_files: what benches printed, none for the costs of this machine; file_ms: of writing one file, None to
    measure; workers: the one number to forecast, None to search; requests: how many are drawn; seed: of all draws.
    """

    rate: float
    p99_s: float
    mix: Mix = field(default_factory=Mix)
    cost_files: tuple[Path, ...] = ()
    file_ms: float | None = None
    workers: int | None = None
    requests: int = 100_000
    seed: int = 0
