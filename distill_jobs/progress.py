"""Progress of long commands: a live display on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_EVERY_S = 10.0


def job_progress(console: Console | None = None, *, quiet: bool = False) -> Progress:
    """The display for this terminal, or lines where standard error is none. Tasks have a field ``loss``: text.

    quiet: show nothing.
    """
    console = console or Console(stderr=True, log_path=False, quiet=quiet)
    if not console.is_terminal:
        return LineProgress(console)
    return Progress(
        TextColumn("{task.description:>10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[loss]}"),
        console=console,
    )


class LineProgress(Progress):
    """For logs: a line for each task every LINE_EVERY_S seconds, and one at its end."""

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, disable=True)
        self._shown: dict[TaskID, float] = {}

    def add_task(self, *args: Any, **kwargs: Any) -> TaskID:
        task_id = super().add_task(*args, **kwargs)
        self._shown[task_id] = time.monotonic()
        return task_id

    def update(self, task_id: TaskID, **kwargs: Any) -> None:
        super().update(task_id, **kwargs)
        self._show(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._show(task_id)

    def _show(self, task_id: TaskID) -> None:
        task, now = self._tasks[task_id], time.monotonic()
        if task_id not in self._shown or not (task.finished or now - self._shown[task_id] >= LINE_EVERY_S):
            return
        if task.finished:
            del self._shown[task_id]
        else:
            self._shown[task_id] = now
        facts = [f"{task.completed:g}/{task.total or 0:g}", task.fields.get("loss", "")]
        if task.speed:
            facts.append(f"{task.speed:.3g}/s")
        if not task.finished and task.time_remaining:
            facts.append(f"{task.time_remaining:.0f} s left")
        self.console.log(f"{task.description}: {', '.join(fact for fact in facts if fact)}")
