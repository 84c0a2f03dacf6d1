"""Progress where standard error is no terminal: lines, not bars."""

import io
import re

import pytest
from rich.console import Console

from distill_jobs import progress
from distill_jobs.progress import LineProgress, job_progress


def test_a_log_gets_lines_at_intervals_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    log = io.StringIO()
    with job_progress(Console(file=log, width=200)) as display:
        task = display.add_task("teacher", total=40, loss="")
        for update in range(1, 41):
            now[0] += 1.0
            display.update(task, completed=update, loss=f"loss {update}")
    lines = log.getvalue().splitlines()
    assert re.findall(r"teacher: (\d+)/40", log.getvalue()) == ["10", "20", "30", "40"]
    assert "loss 30" in lines[2]
    assert "s left" in lines[2]


def test_advance_is_shown_too() -> None:
    log = io.StringIO()
    display = LineProgress(Console(file=log, width=200))
    task = display.add_task("export", total=1, loss="")
    display.advance(task)
    assert "export: 1/1" in log.getvalue()


def test_a_terminal_gets_the_live_display() -> None:
    assert not isinstance(job_progress(Console(file=io.StringIO(), force_terminal=True)), LineProgress)
