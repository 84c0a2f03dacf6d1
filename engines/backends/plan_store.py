"""Engines that were built on this machine, kept under their key: whole and unaltered, or not at all.

A plan is executable code for one graph, library, GPU, driver, ladder of batch sizes and sizes of image. Every file
begins with a line that says what the rest was made from and for, with its hash. What is not exactly what was asked
for is never handed out; its owner builds it again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError

from engines.cache import EngineKey
from engines.errors import BackendError
from engines.manifest import Frozen

Kind = Literal["plan", "kernels", "timings"]
"""The engine itself; kernels that a runtime compiled for it; how fast a builder found the choices it had."""

MAX_STAMP_BYTES = 16 * 1024
_EVERY_GRAPH = "of every graph"

Engine = TypeVar("Engine")


class _Stamp(Frozen):
    """The first line of a file."""

    kind: Kind
    graph_sha256: str
    engine: str
    machine: str
    rungs: tuple[int, ...]
    sizes: tuple[str, ...] = ()
    source: str
    sha256: str
    bytes: int


class PlanStore:
    """What is kept for one engine key and ladder of batch sizes, in the key's folder under ``cache_dir``.

    sizes: of images, where the graph takes several.
    """

    def __init__(self, cache_dir: Path, key: EngineKey, rungs: Sequence[int], sizes: Sequence[str] = ()) -> None:
        self._cache_dir = cache_dir
        self._key = key
        self._rungs = tuple(rungs)
        self._sizes = tuple(sizes)
        self._folder = key.folder(cache_dir) / "models"

    def of_every_graph(self) -> PlanStore:
        """The store of what all graphs of this engine and machine share, whatever code of ours builds them."""
        return PlanStore(self._cache_dir, replace(self._key, graph_sha256=_EVERY_GRAPH, source=""), ())

    def of(self, rung: int, size: int) -> PlanStore:
        """The store of one batch size alone, of images of one of the sizes, by its number."""
        return PlanStore(self._cache_dir, self._key, (rung,), self._sizes[size : size + 1])

    def obtain(self, load: Callable[[bytes], Engine | None], build: Callable[[], bytes]) -> Engine:
        """The kept plan, loaded; else a plan built now, kept, and loaded.

        load: gives None for a plan that the library does not take; it is built again, once.
        Raises: BackendError when what was just built does not load either, and whatever ``build`` raises.
        """
        if (engine := self._loaded(load)) is not None:
            return engine
        with self._making("plan"):
            if (engine := self._loaded(load)) is not None:  # another process was building it
                return engine
            plan = build()
            self._write("plan", plan)
        engine = load(plan)
        if engine is None:
            raise BackendError(
                f"{self._key.engine} does not load the plan it has just built for {self._key.machine}"
            )
        return engine

    def load(self, kind: Kind) -> bytes | None:
        """What is kept, or None where it is missing, damaged, made for something else, or writable by others."""
        try:
            with self.file(kind).open("rb") as file:
                if not is_ours(os.fstat(file.fileno())):
                    return None
                stamp = _Stamp.model_validate_json(file.readline(MAX_STAMP_BYTES))
                data = file.read()
        except (OSError, ValidationError):
            return None
        return data if stamp == self._stamp(kind, data) else None

    def save(self, kind: Kind, data: bytes) -> None:
        """Keep ``data``, replacing what was there in one move. Raises: BackendError when it cannot be written."""
        with self._making(kind):
            self._write(kind, data)

    @contextmanager
    def _making(self, kind: Kind) -> Iterator[None]:
        """Hold the right to make this file. Others wait, then find it kept; a process that dies lets go.

        What a process left unfinished is removed.
        """
        file = self.file(kind)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = file.with_name(f"{file.name}.lock").open("ab")
        except OSError as error:
            raise self._refusal(error) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in file.parent.glob(f"{file.name}.*.partial"):
                left.unlink(missing_ok=True)
            yield

    def _write(self, kind: Kind, data: bytes) -> None:
        file = self.file(kind)
        partial = file.with_name(f"{file.name}.{secrets.token_hex(8)}.partial")  # pids repeat across containers
        try:
            with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), "wb") as opened:
                opened.write(self._stamp(kind, data).model_dump_json().encode() + b"\n")
                opened.write(data)
                opened.flush()
                os.fsync(opened.fileno())
            partial.replace(file)
        except OSError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> BackendError:
        return BackendError(f"cannot keep an engine in {self._folder}: {error}; choose another cache")

    def file(self, kind: Kind) -> Path:
        """Where ``kind`` is kept; it need not exist."""
        return self._folder / f"{'-'.join(map(str, ('engine', *self._rungs, *self._sizes)))}.{kind}"

    def _loaded(self, load: Callable[[bytes], Engine | None]) -> Engine | None:
        plan = self.load("plan")
        return None if plan is None else load(plan)

    def _stamp(self, kind: Kind, data: bytes) -> _Stamp:
        return _Stamp(
            kind=kind,
            graph_sha256=self._key.graph_sha256,
            engine=self._key.engine,
            machine=self._key.machine,
            rungs=self._rungs,
            sizes=self._sizes,
            source=self._key.source,
            sha256=hashlib.sha256(data).hexdigest(),
            bytes=len(data),
        )


def is_ours(status: os.stat_result) -> bool:
    """Whether nobody but this user and root can have written the file."""
    return status.st_uid in {0, os.geteuid()} and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
