"""The command line says what it can do without the libraries that do it."""

import subprocess
import sys

import pytest

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
