"""An engine process until it is ready: it loads, or says why not, and ends with those who wait for it."""

from __future__ import annotations

import asyncio
import errno
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engines.errors import BackendError
from server.engine_process import EngineProcess
from server.settings import Settings

pytestmark = pytest.mark.anyio


async def test_an_engine_that_loads_ends_when_it_is_closed(settings: Settings) -> None:
    engine = EngineProcess(settings, (sys.executable, "-c", "import time; time.sleep(60)"))
    spawning = asyncio.create_task(asyncio.to_thread(engine.spawn))
    while engine.pid == 0:  # noqa: ASYNC110 - a thread sets it
        await asyncio.sleep(0.01)
    await engine.close()
    with pytest.raises(BackendError, match="ended while it loaded"):
        await spawning
    assert engine._process is not None
    assert engine._process.returncode == -signal.SIGKILL


async def test_an_engine_that_cannot_be_started_says_so(settings: Settings) -> None:
    with pytest.raises(BackendError, match="cannot be started"):
        await asyncio.to_thread(EngineProcess(settings, ("/nowhere/to/be/found",)).spawn)


@pytest.mark.parametrize("want", ["socketpair", "mmap"])
async def test_an_engine_for_which_there_is_no_room_says_so(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, want: str
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr({"socketpair": "socket.socketpair", "mmap": "server.call_watch.mmap.mmap"}[want], refused)
    with pytest.raises(BackendError, match=r"cannot be started: .*Too many open files"):
        EngineProcess(settings).spawn()


async def test_an_engine_that_is_not_ready_in_time_says_so_and_what_to_do(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine_process.START_S", 0.2)
    engine = EngineProcess(settings, (sys.executable, "-c", "import time; time.sleep(300)"))
    with pytest.raises(BackendError, match=r"not ready within 0\.2 s .*engines build.*start_backend.*rungs"):
        await asyncio.to_thread(engine.spawn)
    assert engine._process is not None
    assert engine._process.returncode == -signal.SIGKILL


async def test_an_engine_that_cannot_load_says_why(tmp_path: Path) -> None:
    engine = EngineProcess(Settings(bundles=(tmp_path / "nothing",), cache_dir=None))
    with pytest.raises(BackendError, match="nothing"):
        await asyncio.to_thread(engine.spawn)


LOADS_FOR_EVER = """
import socket, subprocess, sys, time
from server.engine_wire import frame
from server.settings import Settings

ours, theirs = socket.socketpair()
load = "lambda *_: print('loading', flush=True) or time.sleep(300)"
child = f"from server.engine_child import main; import time; main({load})"
page = open(sys.argv[1], "w+b")
page.truncate(4096)
fds = (theirs.fileno(), page.fileno())
subprocess.Popen([sys.executable, "-c", child, *map(str, fds)], pass_fds=fds)
theirs.close()
ours.sendall(frame({"settings": Settings().model_dump(mode="json"), "known": {}, "versions": {}}))
time.sleep(300)
"""


def test_an_engine_that_loads_ends_with_its_worker(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOADS_FOR_EVER, str(tmp_path / "page")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "loading\n"
        worker.kill()
        ended, _, _ = select.select([worker.stdout], [], [], 120)  # once nobody holds the other end any more
        assert ended


FREEZES = """
import gc, sys
from pathlib import Path
from server.engine_child import main

done, file = [], Path(sys.argv.pop(1))
gc.freeze = lambda: file.write_text(" ".join([*done, "frozen"]))
main(lambda *_: done.append("loaded") or {})
"""


async def test_what_an_engine_process_has_loaded_is_no_garbage_once_it_is_ready(
    settings: Settings, tmp_path: Path
) -> None:
    engine = EngineProcess(settings, (sys.executable, "-c", FREEZES, str(tmp_path / "done")))
    await asyncio.to_thread(engine.spawn)
    assert (tmp_path / "done").read_text() == "loaded frozen"
    await engine.close()


async def test_an_engine_that_dies_while_loading_says_so(settings: Settings) -> None:
    engine = EngineProcess(settings, (sys.executable, "-c", "raise SystemExit(1)"))
    with pytest.raises(BackendError, match="ended while it loaded"):
        await asyncio.to_thread(engine.spawn)
