"""API, worker and Redis run as their images run them; the checks themselves are in ``confined_processes``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.confine import NOBODY, confined, reason_not_to

pytestmark = pytest.mark.skipif(bool(reason_not_to()), reason=reason_not_to() or "it can")


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(confined(sys.executable, "-c", code), check=False, capture_output=True, text=True)


def test_confinement_is_real() -> None:
    assert run("import os; print(os.getuid())").stdout.strip() == str(NOBODY)
    assert "Read-only file system" in run("open('server/probe', 'w')").stderr
    assert "Network is unreachable" in run("import socket; socket.create_connection(('192.0.2.1', 80))").stderr


def test_api_and_worker_serve_confined() -> None:
    checks = Path(__file__).with_name("confined_processes.py")
    command = confined(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(checks))
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
