"""What images hashed to, by their files' sizes and times of change: who comes back does not read them all again."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from distill_jobs.checkpoint import write_text
from distill_jobs.data.captioned import Captioned
from distill_jobs.errors import StorageError

SETTLED_S = 3.0
"""A file that was changed later than that may change again and keep its time: some disks tell it to two seconds."""


def remembered(folder: Path, told: str, entries: Sequence[Captioned], look: Callable[[], str]) -> str:
    """What ``look`` gives, or gave when all else was as it is now. told: what it depends on besides the entries.

    Kept in ``folder``, where that can be written; else it is looked for again.
    """
    stamp, newest = _stamp(told, entries)
    file = folder / stamp
    with suppress(OSError, UnicodeDecodeError):
        if known := file.read_text(encoding="utf-8").strip():
            return known
    found = look()
    if time.time() - newest > SETTLED_S:
        with suppress(OSError, StorageError):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, found + "\n")
    return found


def _stamp(told: str, entries: Sequence[Captioned]) -> tuple[str, float]:
    """Hash of what can be told of images without reading them; when the newest of their files was changed."""
    files = {entry.file: entry.file.stat() for entry in entries}
    parts = [told]
    for entry in entries:
        stat = files[entry.file]
        file = f"{entry.file.absolute()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        caption = hashlib.sha256(entry.caption.encode()).hexdigest()
        parts.append(f"{file} {entry.offset} {entry.size} {caption}")
    newest = max(stat.st_ctime for stat in files.values())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32], newest
