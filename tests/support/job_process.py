"""Training jobs in real processes that can be killed, forked from a server that has imported everything already."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["pytest", "distill_jobs.job", "distill_jobs.data.digits", "tests.support.tiny_recipe"]
)


@dataclass(frozen=True)
class JobRun:
    """One attempt at a run: ``python -m distill_jobs run digits --out OUT --resume --set …``.

    dies_at: SIGKILL at this event, counting reports of progress and file operations inside the run folder.
    terminated_at: SIGTERM to itself at this report. file_limit: bytes that a file can have before writes fail.
    threads: of torch, before the job decides.
    """

    out: Path
    overrides: Sequence[str]
    dies_at: int | None = None
    terminated_at: int | None = None
    file_limit: int | None = None
    threads: int = 1

    @property
    def reported(self) -> bool:
        return self._reports.is_file()

    @property
    def last_report(self) -> tuple[str, int]:
        """Phase and update of the last report, also of an attempt that was killed."""
        phase, update = self._reports.read_text().split()
        return phase, int(update)

    @property
    def _reports(self) -> Path:
        return self.out.with_name(f"{self.out.name}.reports")

    def report(self, phase: str, update: int) -> None:
        staged = self._reports.with_suffix(".writing")
        staged.write_text(f"{phase} {update}")
        staged.replace(self._reports)

    def start(self, rank: int = 0, world: int = 1, port: int = 0) -> ForkServerProcess:
        self._reports.unlink(missing_ok=True)
        process = context.Process(target=_run, args=(self, rank, world, port))
        process.start()
        return process

    def exit_code(self) -> int:
        """Of the attempt, run to its end; negative is a signal."""
        return ended(self.start())


def ended(*processes: ForkServerProcess) -> int:
    """The one exit code of processes that end together."""
    for process in processes:
        process.join(300)
        if process.exitcode is None:
            process.kill()
    codes = {process.exitcode for process in processes}
    assert len(codes) == 1, codes
    (code,) = codes
    assert code is not None
    return code


def together(runs: Sequence[JobRun]) -> list[ForkServerProcess]:
    """Start runs as the processes of one job, as torchrun would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [run.start(rank, len(runs), port) for rank, run in enumerate(runs)]


class _Reports(Progress):
    """Counts reports, and events that are added from elsewhere."""

    def __init__(self, run: JobRun) -> None:
        super().__init__(console=Console(stderr=True, width=200), disable=True)
        self._run, self._events, self._reports = run, 0, 0

    def update(self, *args: Any, **kwargs: Any) -> None:
        super().update(*args, **kwargs)
        task = self.tasks[-1]
        self._run.report(task.description, int(task.completed))
        self._reports += 1
        if self._reports == self._run.terminated_at:
            os.kill(os.getpid(), signal.SIGTERM)
        self.event()

    def event(self) -> None:
        self._events += 1
        if self._events == self._run.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)


def _run(run: JobRun, rank: int, world: int, port: int) -> None:
    from distill_jobs.errors import JobError
    from distill_jobs.job import run_job
    from distill_jobs.recipe_file import read_recipe

    if world > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    if run.file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (run.file_limit, resource.RLIM_INFINITY))
    torch.set_num_threads(run.threads)
    gc.freeze()  # what was imported is no garbage
    progress = _Reports(run)
    if run.dies_at is not None:
        _watch_files(run.out, progress)
    try:
        run_job(read_recipe("digits", list(run.overrides)), run.out, resume=True, progress=progress)
    except JobError as error:
        print(f"Error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)


def _watch_files(folder: Path, progress: _Reports) -> None:
    """Make every opening, renaming, making and removing of a file under ``folder`` an event."""
    events = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove"}

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in events and str(args[0]).startswith(str(folder)):
            progress.event()

    sys.addaudithook(hook)
