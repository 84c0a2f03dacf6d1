"""The command line says what it can do without the libraries that do it."""

import errno
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from distill_jobs import commands
from distill_jobs.cli import app
from distill_jobs.processes import launched_rank


def test_help_loads_no_torch() -> None:
    told = "import sys, distill_jobs.cli; print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


def test_only_the_first_of_several_processes_shows_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert launched_rank() == 0
    monkeypatch.setenv("RANK", "3")
    assert launched_rank() == 3


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "report.json"),
            6,
            "No space left on device: report.json",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 6, "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), 1, "Permission denied: runs"),
        (OSError("no file named model.safetensors"), 1, "no file named model.safetensors"),
        (torch.OutOfMemoryError("Tried to allocate 2 GiB"), 1, "too little memory (Tried to allocate 2 GiB)"),
    ],
    ids=["full disk", "full disk, no name", "permission", "a library's own", "memory"],
)
def test_errors_of_the_system_are_one_sentence(
    error: Exception, code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(commands, "evaluate", fails)
    result = CliRunner().invoke(app, ["evaluate", "runs"])
    assert result.exit_code == code
    assert said in result.stderr
    assert "None" not in result.stderr
