"""Pictures of glyphs on disk: drawn once into webdataset shards, in a folder named by all that they depend on."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

from rich.progress import Progress

from distill_jobs.checkpoint import write_folder
from distill_jobs.data.glyphs import read_glyphs, read_names
from distill_jobs.data.scenes import Held, Scene, Scenes
from distill_jobs.latent_sections import GlyphData, Shares

SHARD_PICTURES = 2000
DRAWN = 2
"""Raise it when the same settings draw other pictures."""


def scenes_of(data: GlyphData, seed: int) -> Scenes:
    """The pictures of a section, by index. Raises: DataError saying what is missing and which package has it."""
    glyphs = read_glyphs(data.font, read_names(data.names))
    return Scenes(glyphs, Held(seed, data.held_glyphs, data.held_compositions), data.side_px, data.shares)


def drawn(data: GlyphData, seed: int, progress: Progress) -> Path:
    """The folder of a section's shards, drawn now if it does not stand. Raises: DataError; StorageError."""
    scenes = scenes_of(data, seed)
    folder = Path(data.path) / _identity(data, seed)
    if folder.is_dir():
        return folder
    task = progress.add_task("pictures", total=data.pictures, loss="")

    def fill(staging: Path) -> None:
        for first in range(0, data.pictures, SHARD_PICTURES):
            with tarfile.open(staging / f"{first // SHARD_PICTURES:03d}.tar", "w") as shard:
                for index in range(first, min(first + SHARD_PICTURES, data.pictures)):
                    _add(shard, f"{index:06d}", scenes.scene(index))
                    progress.advance(task)

    write_folder(folder, fill)
    return folder


def _identity(data: GlyphData, seed: int) -> str:
    digest = hashlib.sha256(data.font.read_bytes() + data.names.read_bytes())
    settings = (DRAWN, seed, data.pictures, data.side_px, data.held_glyphs, data.held_compositions)
    other = () if data.shares == Shares() else tuple(data.shares.model_dump().values())
    digest.update(repr(settings + other).encode())
    return digest.hexdigest()[:16]


def _add(shard: tarfile.TarFile, key: str, scene: Scene) -> None:
    buffer = io.BytesIO()
    scene.picture.save(buffer, "PNG")
    for name, content in ((f"{key}.png", buffer.getvalue()), (f"{key}.txt", scene.caption.encode())):
        member = tarfile.TarInfo(name)
        member.size = len(content)
        shard.addfile(member, io.BytesIO(content))
