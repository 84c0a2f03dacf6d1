"""Compiling engines into the cache in a process of its own, at low priority: serving goes on undisturbed.

``python -m server.engine_build`` is told its settings by a line on stdin and answers with a line on stdout. It ends
when the other side of stdin does. What a killed build leaves behind is never loaded (``engines.backends``).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from engines.errors import BackendError, HalfstepError
from engines.open import build_engines
from server.loading import trusted, usable_cache
from server.logs import configure_logs
from server.settings import Settings

NICENESS = 10
COMMAND = (sys.executable, "-m", "server.engine_build")
TOLD = {"bundles", "bundle_key", "backend", "precision", "threads", "rungs", "cache_dir", "log_level"}


async def build(settings: Settings, command: Sequence[str] = COMMAND) -> None:
    """Have every bundle's engines built; cancelling it kills the build. command: the process, for tests.

    Raises: BackendError with what the build says, or how it ended.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
    except OSError as error:
        raise BackendError(f"The build cannot be started: {error}.") from error
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("both were asked to be pipes")
    try:
        process.stdin.write(settings.model_dump_json(include=TOLD).encode() + b"\n")
        answer = await process.stdout.read()
        status = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if status:
        said: dict[str, Any] = json.loads(answer) if answer.endswith(b"}\n") else {}
        ended = f"was ended by signal {-status}" if status < 0 else f"exited with status {status}"
        raise BackendError(said.get("refused", f"The build of the {settings.backend} engines {ended}."))


def main() -> None:
    """Build what the first line of stdin says."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the worker ends it
    os.nice(NICENESS)
    settings = Settings(**json.loads(sys.stdin.readline()))
    configure_logs(settings.log_level)
    threading.Thread(target=_end_with_worker, name="worker", daemon=True).start()
    try:
        _build(settings)
    except HalfstepError as error:
        print(json.dumps({"refused": str(error)}), flush=True)  # noqa: T201 - the answer
        os._exit(1)
    os._exit(0)  # without waiting for stdin


def _build(settings: Settings) -> None:
    cache_dir = usable_cache(settings.cache_dir)
    if cache_dir is None:
        raise BackendError(f"Nothing can be built without a cache; {settings.cache_dir} cannot be written.")
    for path in settings.bundles:
        build_engines(
            trusted(path, settings),
            settings.backend,
            precision=settings.precision,
            threads=settings.threads,
            cache_dir=cache_dir,
            rungs=settings.rungs,
        )


def _end_with_worker() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
