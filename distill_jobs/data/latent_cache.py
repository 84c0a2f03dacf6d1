"""Latents and text embeddings on disk, computed once: safetensors shards, each named by what it was made from.

A shard's name is the hash of its images, their captions, the size and the encoders; its folder's is the version of
the code. So a cache that was interrupted goes on where it stopped, several jobs share one, and what a changed image
or encoder gave is computed again. Values are float16.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill_jobs.data.captioned import Captioned
from distill_jobs.data.framing import Framed, framed_batches
from distill_jobs.data.seen import remembered
from distill_jobs.data.source import Condition
from distill_jobs.errors import DataError, JobError, NoneReadableError, StorageError, first_line
from distill_jobs.pipelines.vae import Encoded

log = logging.getLogger(__name__)

ROWS_VERSION = 1
"""Raise it when the same images, captions and encoders give other rows: other framing, encoding or columns.

Caches are then made anew beside the old ones, and the rows' identity stays: an update of ours ends no run.
"""
SHARD_ROWS = 256
ENCODED_ROWS = 8
"""Of images encoded at once, where the device's memory allows it."""
OPEN_SHARDS = 64
WHOLE = ("place", "time_ids")


class Encoding(Protocol):
    """Pictures and captions to rows of a cache; results on the CPU."""

    def latents(self, pixels: Tensor) -> Encoded: ...

    def condition(self, captions: Sequence[str], time_ids: Tensor) -> Condition: ...

    def null(self) -> Condition: ...


@dataclass(frozen=True)
class CacheKey:
    """What all rows of a cache have in common.

    encoders: their hash; side_px: of the framed images; zeros: whether the empty condition is zeros.
    """

    encoders: str
    side_px: int
    zeros: bool = False

    def shard(self, entries: Sequence[Captioned]) -> str:
        """The name of the shard of these images."""
        parts = [self.encoders, str(self.side_px), *(entry.digest() for entry in entries)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def null(self) -> str:
        told = f"{self.encoders} zeros" if self.zeros else self.encoders
        return f"null-{hashlib.sha256(told.encode()).hexdigest()[:32]}"


@dataclass(frozen=True)
class LatentCache:
    """A finished cache.

    files, ends, firsts: shards, where the rows of each end, and where its images begin among all; skipped: names of
    images left out.
    """

    files: tuple[Path, ...]
    ends: tuple[int, ...]
    firsts: tuple[int, ...]
    null: Condition
    skipped: tuple[str, ...]

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def identity(self) -> str:
        """Hash of all rows in their order: of images, captions and encoders."""
        return hashlib.sha256("\n".join(file.name for file in self.files).encode()).hexdigest()

    def rows(self, indices: Tensor) -> tuple[Encoded, Condition]:
        """Float32 rows at indices: (B,) int64."""
        rows = [self._row(int(index)) for index in indices]
        columns = {name: torch.stack([row[name] for row in rows]).float() for name in rows[0]}
        condition = Condition(columns["tokens"], columns.get("pooled"), columns.get("time_ids"))
        return Encoded(columns["mean"], columns["std"]), condition

    def images(self, indices: Tensor) -> list[int]:
        """Which of all images the rows at indices: (B,) were made from."""
        found = []
        for index in indices.tolist():
            shard, row = self._place(index)
            found.append(self.firsts[shard] + int(_opened(self.files[shard]).get_slice("place")[row]))
        return found

    def _row(self, index: int) -> dict[str, Tensor]:
        shard, row = self._place(index)
        file = _opened(self.files[shard])
        return {name: file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118 - no mapping

    def _place(self, index: int) -> tuple[int, int]:
        """(shard, row in it)."""
        shard = bisect_right(self.ends, index)
        return shard, index - (self.ends[shard - 1] if shard else 0)


class CacheWriter:
    """Fills a cache folder. skip_unreadable: leave out images that cannot be decoded, instead of an error.

    names: of the shards known so far, by their place; to find one, its images are read, if they were not before.
    """

    def __init__(self, folder: Path, key: CacheKey, entries: Sequence[Captioned], skip_unreadable: bool) -> None:
        self._folder, self._key, self._skip = folder, key, skip_unreadable
        self._chunks = [entries[i : i + SHARD_ROWS] for i in range(0, len(entries), SHARD_ROWS)]
        self._rows = ENCODED_ROWS
        self.names: dict[int, str] = {}

    def write(self, load: Callable[[], Encoding], advance: Callable[[int], None], index: int, of: int) -> None:
        """Compute what is missing of every ``of``-th shard from ``index`` on. load: called if anything is missing.

        What cannot be opened is computed again. advance: told the images done.
        Raises: DataError naming an image; StorageError; JobError when the device has no memory for a single image.
        """
        encoders: Encoding | None = None
        if index == 0 and not _intact(self._file(self._key.null())):
            encoders = load()
            empty = _columns(encoders.null())
            _check_finite(empty, ["the empty caption"])
            _save(empty, self._file(self._key.null()))
        for chunk in range(index, len(self._chunks), of):
            if not _intact(self._shard(chunk)):
                encoders = encoders or load()
                _save(self._encoded(encoders, self._chunks[chunk]), self._shard(chunk))
            advance(len(self._chunks[chunk]))

    def finished(self) -> LatentCache:
        """The cache, once all shards are there; images of shards without a name are read.

        Raises: NoneReadableError when no image could be read; DataError when what another process wrote is not to
        be seen here.
        """
        files, ends, firsts, skipped, total = [], [], [], list[str](), 0
        for chunk, file in enumerate(map(self._shard, range(len(self._chunks)))):
            rows, there = _places(file)
            skipped += [entry.name for place, entry in enumerate(self._chunks[chunk]) if place not in there]
            total += rows
            if rows:
                files.append(file)
                ends.append(total)
                firsts.append(chunk * SHARD_ROWS)
        if not files:
            raise NoneReadableError(f"none of the images can be read, from {skipped[0]} on")
        null = load_file(self._file(self._key.null()))
        empty = Condition(null["tokens"].float(), null["pooled"].float() if "pooled" in null else None)
        return LatentCache(tuple(files), tuple(ends), tuple(firsts), empty, tuple(skipped))

    def _shard(self, chunk: int) -> Path:
        if chunk not in self.names:
            key, entries = self._key, self._chunks[chunk]
            told = f"{key.encoders} {key.side_px}"
            self.names[chunk] = remembered(self._rows_folder / "seen", told, entries, lambda: key.shard(entries))
        return self._file(self.names[chunk])

    def _file(self, name: str) -> Path:
        return self._rows_folder / f"{name}.safetensors"

    @property
    def _rows_folder(self) -> Path:
        return self._folder / f"rows-{ROWS_VERSION}"

    def _encoded(self, encoders: Encoding, chunk: Sequence[Captioned]) -> dict[str, Tensor]:
        """The columns of a shard; none where no image could be read."""
        parts, first = list[dict[str, Tensor]](), 0
        for batch in framed_batches(chunk, self._key.side_px, ENCODED_ROWS):
            parts += self._parts(encoders, chunk, self._readable(batch, first))
            first += len(batch)
        return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}

    def _readable(self, batch: Sequence[Framed | DataError], first: int) -> list[tuple[int, Framed]]:
        """(place in the shard, picture) of those that were read. first: the place of the first."""
        found = []
        for place, picture in enumerate(batch, start=first):
            if isinstance(picture, Framed):
                found.append((place, picture))
            elif not self._skip:
                raise DataError(f"{picture}; leave such images out with data.unreadable: skip")
        return found

    def _parts(
        self, encoders: Encoding, chunk: Sequence[Captioned], rows: list[tuple[int, Framed]]
    ) -> Iterator[dict[str, Tensor]]:
        """Their columns, in parts of as many rows as the device has memory for, which the writer remembers."""
        while rows:
            tried = min(self._rows, len(rows))
            try:
                part = _part(encoders, chunk, rows[:tried])
            except torch.OutOfMemoryError as error:
                if tried == 1:
                    raise JobError(
                        f"too little memory on the device to encode an image of {self._key.side_px} pixels "
                        f"({first_line(error)}); free it of other jobs, or take one with more; what was cached is "
                        "kept"
                    ) from None
                self._rows = tried // 2
            else:
                yield part
                rows = rows[tried:]


def _part(encoders: Encoding, chunk: Sequence[Captioned], rows: Sequence[tuple[int, Framed]]) -> dict[str, Tensor]:
    """The columns of a few rows of a shard: (place in it, picture). Raises: DataError; torch.OutOfMemoryError."""
    encoded = encoders.latents(torch.stack([picture.pixels for _, picture in rows]))
    captions = [chunk[place].caption for place, _ in rows]
    condition = encoders.condition(captions, torch.stack([picture.time_ids for _, picture in rows]))
    own = {"place": torch.tensor([place for place, _ in rows]), "mean": encoded.mean, "std": encoded.std}
    columns = {**own, **_columns(condition)}
    _check_finite(columns, [chunk[place].name for place, _ in rows])
    return columns


def _columns(condition: Condition) -> dict[str, Tensor]:
    named = {"tokens": condition.tokens, "pooled": condition.pooled, "time_ids": condition.time_ids}
    return {name: part for name, part in named.items() if part is not None}


def _check_finite(columns: dict[str, Tensor], names: Sequence[str]) -> None:
    """Raises: DataError with the name of the first row whose latent or condition float16 cannot hold."""
    for column, values in columns.items():
        kept = values if column in WHOLE else values.half()
        finite = torch.isfinite(kept).reshape(len(kept), -1).all(dim=1).tolist()
        if not all(finite):
            name = names[finite.index(False)]
            raise DataError(f"{name}: the teacher's encoders give NaN, or more than float16 holds ({column})")


def _intact(file: Path) -> bool:
    """Whether a file of the cache is there and whole; one that was cut off is said."""
    if not file.is_file():
        return False
    try:
        with safe_open(file, framework="pt"):
            return True
    except (OSError, SafetensorError) as error:
        log.warning("cached latents %s are damaged (%s); computed again", file, error)
        return False


def _places(file: Path) -> tuple[int, set[int]]:
    """How many rows a shard has, and the places of their images in it. Raises: DataError when it is not there."""
    try:
        with safe_open(file, framework="pt") as opened:
            rows = int(opened.metadata()["rows"])
            return rows, set(opened.get_tensor("place").tolist()) if rows else set()
    except FileNotFoundError:
        raise DataError(
            f"data.cache: {file}, which a process of this job has written, is not there; on several machines the "
            "folder must be on a disk that they share"
        ) from None


def _save(columns: dict[str, Tensor], file: Path) -> None:
    """In one move. Whole numbers stay as they are: float16 does not hold every pixel count."""
    rows = len(next(iter(columns.values()))) if columns else 0
    kept = {name: part if name in WHOLE else part.half() for name, part in columns.items()}
    staging = file.with_name(f".{file.name}.{secrets.token_hex(8)}.writing")  # pids repeat across containers
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: part.contiguous() for name, part in kept.items()}, staging, metadata={"rows": str(rows)})
        with staging.open("rb") as written:
            os.fsync(written.fileno())
        staging.replace(file)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):  # as where the folder is a file
            staging.unlink()
        raise StorageError(f"{file} cannot be written ({error}); what was cached before is intact") from error


@lru_cache(maxsize=OPEN_SHARDS)
def _opened(file: Path) -> Any:
    return safe_open(file, framework="pt")
