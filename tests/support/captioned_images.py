"""Small captioned images on disk, in the forms that jobs read."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SIDES = ((16, 16), (20, 16), (16, 31))


def encoded(index: int, size: tuple[int, int] = (16, 16)) -> bytes:
    """A PNG of noise. size: width and height."""
    pixels = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def caption(index: int) -> str:
    return f"{'a cat' if index % 2 else 'a dog'} number {index}"


def image_folder(folder: Path, count: int, *, parquet: bool = False) -> Path:
    """Images of several sizes and their metadata."""
    folder.mkdir(parents=True)
    rows = []
    for index in range(count):
        (folder / f"{index}.png").write_bytes(encoded(index, SIDES[index % len(SIDES)]))
        rows.append({"file_name": f"{index}.png", "text": caption(index)})
    if parquet:
        pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return folder


def shards(folder: Path, counts: tuple[int, ...]) -> Path:
    """Webdataset shards of as many pairs; captions in turn as text and as JSON."""
    folder.mkdir(parents=True)
    index = 0
    for number, count in enumerate(counts):
        with tarfile.open(folder / f"{number:03d}.tar", "w") as shard:
            for _ in range(count):
                text = caption(index)
                told = ("json", json.dumps({"text": text})) if index % 2 else ("txt", text)
                _add(shard, f"{index:04d}.png", encoded(index, SIDES[index % len(SIDES)]))
                _add(shard, f"{index:04d}.{told[0]}", told[1].encode())
                index += 1
    return folder


def _add(shard: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    shard.addfile(member, io.BytesIO(data))
