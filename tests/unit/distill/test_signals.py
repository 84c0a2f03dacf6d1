"""The first signal asks, the second ends; a worker does not outlive its launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_at_once(number: signal.Signals) -> None:
    script = f"""
import os
from distill_jobs.signals import StopSignal
with StopSignal().listening() as stop:
    os.kill(os.getpid(), {int(number)})
    print("asked", stop.received, flush=True)
    os.kill(os.getpid(), {int(number)})
    print("still here")
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.stdout == "asked True\n"
    assert ended.returncode == -number


def test_handlers_are_given_back() -> None:
    script = """
import signal
from distill_jobs.signals import StopSignal
before = signal.getsignal(signal.SIGTERM)
with StopSignal().listening():
    pass
assert signal.getsignal(signal.SIGTERM) == before
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux")
def test_a_worker_is_asked_to_stop_when_its_launcher_is_killed() -> None:
    worker = """
import time
from distill_jobs.signals import StopSignal, stop_with_launcher
stop_with_launcher()
with StopSignal().listening() as stop:
    print("ready", flush=True)
    while not stop.received:
        time.sleep(0.05)
"""
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"
    process = subprocess.Popen([sys.executable, "-c", launcher], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    (child,) = psutil.Process(process.pid).children()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    limit = time.monotonic() + 60
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < limit:
        time.sleep(0.05)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
