"""Where finished files lie whose client asked for addresses: a folder, or a bucket of an S3-compatible store.

A key starts with the minute its file expires in. So whoever sweeps, after whatever crash, finds what is over by
listing those minutes alone, and files that an attempt left behind when it died go with the others.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, S3Store

from server.errors import StartError
from server.metrics import OPERATIONS, Metrics
from server.outage import Outage
from server.request import OutputFormat, media_type

AWAY = "result_store_failed"
SWEEP_S = 60.0
_SLOT_S = 60
_KEY = re.compile(r"(?P<expires>[0-9]{1,12})/[\w-]+\.(?P<format>png|jpeg|webp)", re.ASCII)
_CALL_S = timedelta(seconds=10)
_RETRY_S = timedelta(seconds=15)


class ResultStoreError(OSError):
    """The result store cannot be reached, or refuses."""


class FileGoneError(Exception):
    """There is no such file, or none any more."""


def is_folder(place: str) -> bool:
    """Whether this value of the setting ``result_store`` is a folder. Raises: ValueError when it is nothing."""
    scheme = urlsplit(place).scheme
    if scheme in ("", "file"):
        return True
    if scheme != "s3" or not urlsplit(place).netloc:
        raise ValueError("it is a folder, file:///folder or s3://bucket/prefix")
    return False


class ResultStore:
    """ttl_s: how long a file is kept, rounded up to the minute; clock: s since 1970; outages: by operation."""

    def __init__(
        self,
        place: LocalStore | S3Store,
        ttl_s: float,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._place = place
        self._ttl_s = ttl_s
        self._metrics = metrics
        self._clock = clock
        self.outages = {each: Outage(AWAY, "result_store_back", logging.ERROR) for each in OPERATIONS}

    @classmethod
    def open(cls, place: str, ttl_s: float, metrics: Metrics) -> Self:
        """place: a folder, which is made, ``file:///folder``, or ``s3://bucket/prefix``, with the usual variables
        (``AWS_ACCESS_KEY_ID``, ``AWS_REGION``, ``AWS_ENDPOINT_URL`` …). Raises: StartError.
        """
        try:
            if not is_folder(place):
                bucket = S3Store.from_url(
                    place,
                    client_options={"timeout": _CALL_S, "allow_http": True},  # where the endpoint has no TLS
                    retry_config={"max_retries": 3, "retry_timeout": _RETRY_S},
                )
                return cls(bucket, ttl_s, metrics)
            folder = Path(urlsplit(place).path if place.startswith("file:") else place).expanduser().absolute()
            local = LocalStore(folder, mkdir=True, automatic_cleanup=True)
            probe = f"probe-{secrets.token_hex(8)}"  # of this start alone: others may begin at the same time
            local.put(probe, b"")
            local.delete(probe)
        except (OSError, RuntimeError, ValueError, BaseError) as error:
            reason = str(error).partition("\n")[0]
            raise StartError(f"The setting result_store (HALFSTEP_RESULT_STORE) is unusable: {reason}") from None
        return cls(local, ttl_s, metrics)

    @property
    def signs(self) -> bool:
        """Whether the store gives out addresses of its own; else the API serves its files."""
        return isinstance(self._place, S3Store)

    async def write(self, job_id: str, attempt: int, index: int, kind: OutputFormat, data: bytes) -> str:
        """The key of image ``index``. No two attempts share one, so what is written never changes.

        Raises: ResultStoreError.
        """
        expires = math.ceil((self._clock() + self._ttl_s) / _SLOT_S) * _SLOT_S
        key = f"{expires}/{job_id}-{attempt}-{index}.{kind}"
        attributes = {"Content-Type": media_type(kind)} if self.signs else None  # a folder keeps none
        with self._noted("write"):
            await obstore.put_async(self._place, key, data, attributes=attributes)
        return key

    async def read(self, key: str) -> bytes:
        """Raises: FileGoneError; ResultStoreError."""
        try:
            with self._noted("read"):
                return bytes(await (await obstore.get_async(self._place, key)).bytes_async())
        except FileNotFoundError:
            raise FileGoneError from None

    async def address(self, key: str) -> str:
        """Where the store itself hands the file out until it expires. Raises: ResultStoreError."""
        assert isinstance(self._place, S3Store)
        left = timedelta(seconds=max(1, round(expires_at(key) - self._clock())))
        with self._noted("sign"):
            return await obstore.sign_async(self._place, "GET", key, left)

    async def sweep(self) -> int:
        """Delete the files that have expired; how many. Raises: ResultStoreError."""
        deleted = 0
        with self._noted("delete"):
            listed = await obstore.list_with_delimiter_async(self._place)
            for slot in listed["common_prefixes"]:
                if not slot.isdecimal() or int(slot) > self._clock():
                    continue
                with suppress(FileNotFoundError):  # another process was faster; the next sweep takes the rest
                    async for files in obstore.list(self._place, slot):
                        await obstore.delete_async(self._place, [file["path"] for file in files])
                        deleted += len(files)
        return deleted

    async def keep_swept(self) -> None:
        """Sweep now and then until cancelled."""
        while True:
            with suppress(ResultStoreError):  # it was logged; the next sweep finds the same
                await self.sweep()
            await asyncio.sleep(SWEEP_S)

    @contextmanager
    def _noted(self, operation: str) -> Iterator[None]:
        """Log and count what goes wrong. Raises: FileNotFoundError of a read as it is; ResultStoreError."""
        begun = time.monotonic()
        try:
            yield
        except (BaseError, OSError) as error:
            if isinstance(error, FileNotFoundError) and operation == "read":
                raise
            self._metrics.result_store_failures.labels(operation).inc()
            reason = str(error).partition("\n")[0]
            kind = type(error).__name__
            self.outages[operation].goes_on(kind, begun_s=begun, operation=operation, detail=reason)
            raise ResultStoreError(f"the result store failed to {operation}") from error
        else:
            self.outages[operation].is_over(operation=operation)


def is_key(text: str) -> bool:
    return _KEY.fullmatch(text) is not None


def expires_at(key: str) -> int:
    """Seconds since 1970."""
    return int(key.partition("/")[0])
