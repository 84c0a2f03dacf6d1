"""Captioned images on disk: found once, by reading captions and tar headers, then read in any order.

Two forms. An image folder with ``metadata.jsonl`` or ``metadata.parquet``, whose rows have ``file_name`` and
``text``. Or webdataset shards: uncompressed tar files of pairs such as ``0001.jpg`` and ``0001.txt`` (or
``0001.json`` with a ``text`` or ``caption`` field). Both become the same index, so the order of training is one
permutation over all shards.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from webdataset.shardlists import expand_urls

from distill_jobs.errors import DataError

log = logging.getLogger(__name__)

IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "json")


@dataclass(frozen=True)
class Captioned:
    """An encoded image, ``size`` bytes of ``file`` from ``offset``, and its caption. name: for messages."""

    name: str
    file: Path
    offset: int
    size: int
    caption: str

    def read(self) -> bytes:
        """Raises: DataError when the file is shorter than it was."""
        with self.file.open("rb") as opened:
            opened.seek(self.offset)
            data = opened.read(self.size)
        if len(data) != self.size:
            raise DataError("has changed since the job looked at it; start the job again")
        return data

    def digest(self) -> str:
        """Hash of image and caption."""
        image = hashlib.sha256(self.read()).hexdigest()
        return hashlib.sha256(f"{image} {self.caption}".encode()).hexdigest()


def index_folder(folder: Path) -> tuple[Captioned, ...]:
    """The images that a folder's metadata file lists, in its order.

    Raises: DataError naming the row, when an image is missing, outside the folder or has no caption.
    """
    found = tuple(_folder_entry(folder, row, place) for place, row in _metadata(folder))
    if not found:
        raise DataError(f"{folder}: its metadata lists no images")
    return found


def index_shards(pattern: str, skip: bool = False) -> tuple[Captioned, ...]:
    """The pairs of webdataset shards, in their order. pattern: a folder of tar files, or ``path/{000..015}.tar``.

    skip: of a shard that was cut off have what is whole, and an entry that cannot be read for what is lost;
    captions without an image are left out.
    Raises: DataError naming the shard or the sample that is incomplete.
    """
    folder = Path(pattern)
    files = sorted(folder.glob("*.tar")) if folder.is_dir() else [Path(url) for url in expand_urls(pattern)]
    found = tuple(entry for file in files for entry in _shard_entries(file, skip))
    if not found:
        raise DataError(f"{pattern} holds no tar shards with images; give a folder of them or a/b/{{000..015}}.tar")
    return found


def _metadata(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of each row of metadata.jsonl or metadata.parquet."""
    lines, table = folder / "metadata.jsonl", folder / "metadata.parquet"
    if lines.is_file():
        for number, line in enumerate(_text(lines.read_bytes(), str(lines)).split("\n"), start=1):
            if line.strip():
                yield f"{lines}:{number}", _json_object(line, f"{lines}:{number}")
    elif table.is_file():
        try:
            rows = pq.read_table(table, columns=["file_name", "text"]).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{table} is not a parquet file that can be read: {error}") from None
        yield from ((f"{table}, row {number}", row) for number, row in enumerate(rows))
    else:
        raise DataError(
            f"{folder} has neither metadata.jsonl nor metadata.parquet, with file_name and text in each row; of "
            "captions in files beside their images make a shard with tar, for data.kind: webdataset"
        )


def _folder_entry(folder: Path, row: dict[str, Any], place: str) -> Captioned:
    name, text = row.get("file_name"), row.get("text")
    if not isinstance(name, str) or not isinstance(text, str):
        raise DataError(f"{place}: a row needs file_name and text, both strings")
    _check_caption(text, place)
    file = folder / name
    if not Path(os.path.abspath(file)).is_relative_to(os.path.abspath(folder)):  # links may lead anywhere
        raise DataError(f"{place}: {name} is outside the folder")
    if not file.is_file():
        raise DataError(f"{place}: {name} is not in the folder")
    return Captioned(str(file), file, 0, file.stat().st_size, text)


@dataclass(frozen=True)
class _Shard:
    """What a tar file holds. captions: by key and extension; cut: the last member of one that was cut off."""

    images: dict[str, tarfile.TarInfo]
    captions: dict[tuple[str, str], str | DataError]
    cut: str


def _shard_entries(file: Path, skip: bool) -> Iterator[Captioned]:
    """The pairs of a shard; of one that was cut off those that are whole, and then an entry that cannot be read."""
    shard = _read_shard(file)
    if shard.cut and not skip:
        raise DataError(
            f"{file} is cut off after {shard.cut}; fetch or write it again, or leave out what is lost with "
            "data.unreadable: skip"
        )
    for key, member in shard.images.items():
        caption = shard.captions.get((key, "txt"), shard.captions.get((key, "json")))
        if isinstance(caption, DataError):
            raise caption
        whole = member.offset_data + member.size <= file.stat().st_size
        if caption is not None and whole:
            yield Captioned(f"{file}: {member.name}", file, member.offset_data, member.size, caption)
        elif not shard.cut:
            raise DataError(f"{file}: {member.name} has no caption beside it ({' or '.join(CAPTIONS)})")
    if shard.cut:
        yield Captioned(f"{file}, cut off after {shard.cut}", file, 0, 0, shard.cut)
        return
    if lone := list(dict.fromkeys(key for key, _ in shard.captions if key not in shard.images)):
        if not skip:
            raise DataError(
                f"{file}: {lone[0]} has a caption and no image ({', '.join(IMAGES)}); take it out, or leave such "
                "out with data.unreadable: skip"
            )
        log.warning("%s: %d captions without an image are left out, %s first", file, len(lone), lone[0])


def _read_shard(file: Path) -> _Shard:
    """Its headers and captions. Raises: DataError."""
    images: dict[str, tarfile.TarInfo] = {}
    captions: dict[tuple[str, str], str | DataError] = {}
    last = ""
    try:
        with tarfile.open(file, "r:") as shard:
            try:
                for member in shard:
                    last = member.name  # should the next not be whole
                    key, _, extension = member.name.rpartition(".")
                    if member.isfile() and extension.lower() in IMAGES:
                        if key in images and images[key].name != last:  # of one added again the later counts
                            raise DataError(
                                f"{file} has two images of one caption, {images[key].name} and {last}; take one out"
                            )
                        images[key] = member
                    elif member.isfile() and extension.lower() in CAPTIONS:
                        told = _caption_or_fault(shard, member, f"{file}: {member.name}")
                        captions[key, extension.lower()] = told
                return _Shard(images, captions, _cut_after(shard, file))
            except tarfile.ReadError:
                if not last:
                    raise
                return _Shard(images, captions, last)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{file} is not an uncompressed tar file that can be read: {error}") from None


def _cut_after(shard: tarfile.TarFile, file: Path) -> str:
    """The last member of a tar file that was cut off; empty where it is whole.

    It ends with blocks of zeros; one that was cut off between two members reads as a shorter one.
    """
    members = shard.getmembers()
    if not members:
        return ""
    last = members[-1]
    blocks = -(-last.size // tarfile.BLOCKSIZE) if last.isfile() else 0
    with file.open("rb") as opened:
        opened.seek(last.offset_data + blocks * tarfile.BLOCKSIZE)
        return "" if opened.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE) else last.name


def _caption_or_fault(shard: tarfile.TarFile, member: tarfile.TarInfo, place: str) -> str | DataError:
    """The caption; or what is wrong with it, which matters where no .txt stands beside a .json."""
    try:
        return _caption(shard, member, place)
    except DataError as error:
        return error


def _caption(shard: tarfile.TarFile, member: tarfile.TarInfo, place: str) -> str:
    opened = shard.extractfile(member)
    assert opened is not None
    text = _text(opened.read(), place)
    caption: Any = text.strip()
    if member.name.lower().endswith("json"):
        row = _json_object(text, place)
        caption = row.get("text", row.get("caption"))
        if not isinstance(caption, str):
            raise DataError(f"{place} has neither text nor caption")
    _check_caption(caption, place)
    return str(caption)


def _check_caption(caption: str, place: str) -> None:
    """An empty one means the absence of a condition, which guidance points away from."""
    if not caption.strip():
        raise DataError(f"{place}: the caption is empty; write one, or take the image out")


def _text(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{place} is not UTF-8 text") from None


def _json_object(text: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise DataError(f"{place} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{place} is not a JSON object")
    return row
