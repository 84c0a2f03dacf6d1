"""What a run told TensorBoard."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader


def losses_of(run: Path) -> dict[str, dict[int, list[float]]]:
    """{phase: {update: values}} of every PHASE/loss; replayed updates have a value for each time."""
    losses: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for file in sorted(run.rglob("events.out.tfevents.*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                phase, _, name = value.tag.partition("/")
                if name == "loss":
                    losses[phase][event.step].append(value.tensor.float_val[0])
    return losses
