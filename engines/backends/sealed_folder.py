"""A folder of compiled models that a library fills and reads by itself, with a hash beside every file in it.

OpenVINO runs what it finds in its cache: measured with 2026.4, one byte changed in the weights of a model is loaded
without a word and changes the results. So nothing is left there for it but what was sealed when it was written,
unaltered. As of plans (``engines.backends.plan_store``), whatever else lies there is removed, and made again. That
is looked into at every use: another process may have been killed there since the last one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engines.backends.plan_store import is_ours
from engines.errors import BackendError

SEAL = ".sha256"
_LOCK = "lock"

_Identity = tuple[int, int, int]
"""Of a file: its number, time of writing and size."""


class SealedFolder:
    """The files of one engine key, made where there are none yet."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._whole: dict[Path, _Identity] = {}
        """What this process has hashed or sealed, and need not hash again while it is the same file."""
        self.wrote = False
        """Whether the last use left a file that was not there before."""

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the library read and write: nothing stays that was not sealed, and what it writes is sealed.

        One process at a time; one that dies leaves files without seals. Raises: BackendError when the folder cannot
        be written.
        """
        with self._locked():
            self._sweep()
            yield
            self._seal()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / _LOCK).open("ab")
        except OSError as error:
            raise BackendError(f"cannot keep an engine in {self.path}: {error}; choose another cache") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _sweep(self) -> None:
        found = {file: _identity(file) for file in self._files()}
        self._whole = {
            file: identity
            for file, identity in found.items()
            if (self._whole.get(file) == identity and _seal_of(file).exists()) or _is_sealed(file)
        }
        seals = {_seal_of(file) for file in self._whole}
        for file in (*(found.keys() - self._whole.keys()), *(set(self.path.glob(f"*{SEAL}")) - seals)):
            file.unlink(missing_ok=True)

    def _seal(self) -> None:
        self.wrote = False
        for file in self._files():
            identity = _identity(file)
            if self._whole.get(file) == identity:
                continue
            seal = _seal_of(file)
            partial = seal.with_name(f"{seal.name}.{os.getpid()}{SEAL}")
            try:
                partial.write_text(_sha256(file), encoding="ascii")
                partial.replace(seal)
            except OSError:  # no room: what was compiled runs all the same, and its file goes at the next use
                partial.unlink(missing_ok=True)
                continue
            self._whole[file] = identity
            self.wrote = True

    def _files(self) -> list[Path]:
        return [f for f in self.path.iterdir() if f.is_file() and f.name != _LOCK and f.suffix != SEAL]


def _identity(file: Path) -> _Identity:
    status = file.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _is_sealed(file: Path) -> bool:
    seal = _seal_of(file)
    try:
        whole = is_ours(file.stat()) and is_ours(seal.stat())
        return whole and seal.read_bytes() == _sha256(file).encode()
    except OSError:
        return False


def _seal_of(file: Path) -> Path:
    return file.with_name(f"{file.name}{SEAL}")


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
