"""From a recipe to its data: digits from a library, or captioned images as the teacher's latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from distill_jobs.data.captioned import Captioned, index_folder, index_shards
from distill_jobs.data.digits import Digits, DigitsSource
from distill_jobs.data.drawing import drawn
from distill_jobs.data.latent_cache import SHARD_ROWS, CacheKey, CacheWriter
from distill_jobs.data.latents import LatentSource
from distill_jobs.data.masked_latents import MaskedLatentSource
from distill_jobs.data.masks import MaskedSource
from distill_jobs.data.shared_disk import check_shared
from distill_jobs.data.source import Source
from distill_jobs.errors import DataError, Interrupted, NoneReadableError
from distill_jobs.latent_sections import CaptionedData, GlyphData, ImageFolderData
from distill_jobs.pipelines.encoders import Encoders, encoders_sha256
from distill_jobs.pipelines.folder import PipelineFolder
from distill_jobs.pipelines.vae import Autoencoder
from distill_jobs.processes import Processes
from distill_jobs.recipe import Recipe
from distill_jobs.signals import StopSignal

MOST_SKIPPED = 0.01
"""Share of the images that may be unreadable where such are left out."""

NAMED = 5


def open_source(
    recipe: Recipe,
    teacher: PipelineFolder | None,
    processes: Processes,
    progress: Progress,
    stop: StopSignal | None = None,
    first: Callable[[Source], None] | None = None,
) -> Source:
    """The source that ``recipe.data`` names. teacher: the folder whose encoders make latents of captioned images.

    Latents that are not cached yet are computed, by all processes, until a signal asks them to stop. first: shown
    the source of the first images alone before the others are encoded, which may take hours.
    Raises: DataError; TeacherError; StorageError; Interrupted.
    """
    if recipe.data == "digits" or teacher is None:
        digits = DigitsSource(Digits.load())
        return digits if recipe.inpainting is None else MaskedSource(digits, recipe.inpainting)
    entries = entries_of(recipe.data, recipe.seed, processes, progress)
    if isinstance(recipe.data, GlyphData) and recipe.data.side_px != teacher.size_px:
        raise DataError(f"data.side_px is {recipe.data.side_px}; the teacher draws pictures of {teacher.size_px}")
    cached = _Cached(recipe.data, teacher, processes, progress, stop)
    if first is not None:
        with suppress(NoneReadableError):
            few = cached.latents(entries[:SHARD_ROWS], "first latents")
            first(_masked(few, recipe, teacher, processes))
            first = None
    latents = cached.latents(entries, "latents")
    _check_skipped(latents, progress)
    source = _masked(latents, recipe, teacher, processes)
    if first is not None:
        first(source)
    return source


def _masked(latents: LatentSource, recipe: Recipe, teacher: PipelineFolder, processes: Processes) -> Source:
    """With a mask and what it leaves to be seen, where networks take them."""
    if recipe.inpainting is None:
        return latents
    autoencoder = Autoencoder.load(teacher).to(processes.device)

    @torch.inference_mode()
    def encode(pixels: Tensor) -> Tensor:
        return autoencoder.encode(pixels.to(processes.device)).mean.cpu()

    return MaskedLatentSource(latents, recipe.inpainting, encode)


@dataclass(frozen=True)
class _Cached:
    """Latents of images by a teacher's encoders, from the cache, or computed into it."""

    data: CaptionedData
    teacher: PipelineFolder
    processes: Processes
    progress: Progress
    stop: StopSignal | None

    def latents(self, entries: Sequence[Captioned], title: str) -> LatentSource:
        """Of these images. title: of the bar that shows how far it is, for this process's share."""
        index, of, teacher = self.processes.index, self.processes.count, self.teacher
        writer = CacheWriter(self.data.cache, self._key, entries, skip_unreadable=self.data.unreadable == "skip")
        starts = range(index * SHARD_ROWS, len(entries), of * SHARD_ROWS)
        own = sum(min(SHARD_ROWS, len(entries) - start) for start in starts)
        task = self.progress.add_task(title, total=own, loss="")

        def advance(images: int) -> None:
            self.progress.advance(task, images)
            if self.stop is not None and self.stop.received:
                raise Interrupted("stopped while latents were computed, which are kept; go on with --resume")

        writer.write(lambda: self._encoders, advance, index, of)
        writer.names |= dict(self.processes.listed(list(writer.names.items())))
        side = teacher.size_px // teacher.pixels_per_latent
        return LatentSource(writer.finished(), (teacher.channels, side, side), entries, teacher.size_px)

    @cached_property
    def _key(self) -> CacheKey:
        check_shared(self.data.cache, "data.cache", self.processes)
        encoders = self.processes.first(lambda: encoders_sha256(self.teacher))
        return CacheKey(encoders, self.teacher.size_px, self.teacher.zeros_for_empty)

    @cached_property
    def _encoders(self) -> Encoders:
        return Encoders.load(self.teacher, self.processes.device)


def _check_skipped(latents: LatentSource, progress: Progress) -> None:
    """Say which images are left out. Raises: DataError where they are too many."""
    skipped, images = latents.cache.skipped, len(latents.entries)
    if not skipped:
        return
    told = f"{len(skipped)} of {images} images cannot be read: {', '.join(skipped[:NAMED])}"
    if len(skipped) > MOST_SKIPPED * images:
        raise DataError(f"{told}; more than {MOST_SKIPPED:.0%} are not left out: mend them or take them out")
    progress.console.log(f"{told}; left out")


def latents_of(source: Source) -> LatentSource | None:
    """The cached latents below a source; None of digits."""
    below = source.source if isinstance(source, MaskedLatentSource) else source
    return below if isinstance(below, LatentSource) else None


def entries_of(data: CaptionedData, seed: int, processes: Processes, progress: Progress) -> tuple[Captioned, ...]:
    """The captioned images of a section; those of glyphs are drawn now if they are not yet, by the first process.

    Raises: DataError; StorageError.
    """
    if isinstance(data, GlyphData):
        check_shared(Path(data.path), "data.path", processes)
        return index_shards(str(processes.first(lambda: drawn(data, seed, progress))))
    if "{" not in data.path and not Path(data.path).exists():
        raise DataError(f"data.path: {data.path} is not there; give a folder or file of this machine")
    if isinstance(data, ImageFolderData):
        return index_folder(Path(data.path))
    return index_shards(data.path, skip=data.unreadable == "skip")
