"""Folders that one process writes and all of them read: on several machines they must be on a disk they share."""

from __future__ import annotations

import secrets
from contextlib import suppress
from pathlib import Path

from distill_jobs.errors import DataError
from distill_jobs.processes import Processes


def check_shared(folder: Path, field: str, processes: Processes) -> None:
    """Let the first process write a file into ``folder``, made if need be, and every other look for it.

    field: the folder's name in the recipe. Where the first may not write there is no error: all that is needed may
    stand there already.
    Raises: DataError, in all processes, where one does not see it.
    """
    if processes.count == 1:
        return
    name = processes.first(lambda: _written(folder))
    if name is None:
        return
    [unseen] = processes.any(not (folder / name).is_file())
    processes.first(lambda: _removed(folder / name))
    if unseen:
        raise DataError(
            f"{field}: {folder} is not the same folder for all processes; on several machines it must be on a disk "
            "that they share"
        )


def _written(folder: Path) -> str | None:
    """The name of a new file in the folder; None where it cannot be written."""
    name = f".{secrets.token_hex(8)}.seen"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    except OSError:
        return None
    return name


def _removed(file: Path) -> None:
    with suppress(OSError):
        file.unlink()
