"""An operator's own check of finished images: any callable, run beside the steps, and closed when it fails.

``check(images, prompt)`` gets the images of one request, (H, W, 3) uint8 RGB arrays that it cannot change, and says
of each whether to withhold it: a list of bools, True to withhold, as diffusers' safety checkers have it.
"""

from __future__ import annotations

import asyncio
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

import numpy as np
import structlog

from server.errors import StartError
from server.jobs import JobFailedError, JobFailure
from server.metrics import Metrics
from server.work import Pixels

Check = Callable[[list[Pixels], str], Sequence[bool]]

UNCHECKED = JobFailure(
    code="safety_check_failed",
    message="The safety check failed on this request, so its images are withheld; the server's log says why.",
)
_log = structlog.get_logger()


class Safety:
    """timeout_s: of one call, the wait for a thread included; threads: calls at once.

    A call that never returns keeps its thread, and no process from ending.
    """

    def __init__(self, check: Check, timeout_s: float, threads: int, metrics: Metrics) -> None:
        self._check = check
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._slots = asyncio.Semaphore(threads)

    async def flags(self, model: str, images: Sequence[Pixels], prompt: str) -> list[bool]:
        """Which images to withhold. Raises: JobFailedError when the check raises, is late or answers nonsense."""
        try:
            async with asyncio.timeout(self._timeout_s):
                flags = await self._called([_read_only(image) for image in images], prompt)
        except Exception as error:  # whatever it raises; its text may hold the prompt, so it is not logged
            self._metrics.safety_checks.labels(model, "failed").inc(len(images))
            _log.error("safety_check_failed", error=type(error).__name__, at=_place(error))
            raise JobFailedError(UNCHECKED) from None
        withheld = sum(flags)
        self._metrics.safety_checks.labels(model, "withheld").inc(withheld)
        self._metrics.safety_checks.labels(model, "passed").inc(len(images) - withheld)
        return flags

    async def _called(self, images: list[Pixels], prompt: str) -> list[bool]:
        """On a daemon thread: those of a pool would hold up the end of the process."""
        await self._slots.acquire()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[bool]] = loop.create_future()

        def settle(flags: list[bool] | None, error: Exception | None) -> None:
            self._slots.release()
            if answer.done():  # too late
                return
            if error is None:
                answer.set_result(flags or [])
            else:
                answer.set_exception(error)

        def call() -> None:
            flags, fault = None, None
            try:
                flags = _flags(self._check(images, prompt), len(images))
            except BaseException as error:  # SystemExit must not let an image through either
                fault = error if isinstance(error, Exception) else RuntimeError(type(error).__name__)
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(settle, flags, fault)

        threading.Thread(target=call, name="safety", daemon=True).start()
        return await answer


def load_check(name: str) -> Check:
    """name: ``module:function``. Raises: StartError."""
    module, _, path = name.partition(":")
    try:
        found: Any = import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:  # importing runs the module, which may raise anything
        raise StartError(
            f"The setting safety_check (HALFSTEP_SAFETY_CHECK) names {name}, which cannot be imported"
            f" ({type(error).__name__}: {error}); put its module on PYTHONPATH."
        ) from None
    if not callable(found):
        raise StartError(f"The setting safety_check (HALFSTEP_SAFETY_CHECK) names {name}, which cannot be called.")
    check: Check = found
    return check


def _flags(answer: Sequence[bool], images: int) -> list[bool]:
    """Raises: TypeError, ValueError unless there is a bool for each image."""
    flags = list(answer)
    if len(flags) != images:
        raise ValueError("a safety check answers with one bool an image")
    if not all(isinstance(flag, bool | np.bool_) for flag in flags):
        raise TypeError("a safety check answers with bools")
    return [bool(flag) for flag in flags]


def _read_only(image: Pixels) -> Pixels:
    view = image.view()
    view.flags.writeable = False
    return view


def _place(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
