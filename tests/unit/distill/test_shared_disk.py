"""Folders that all processes must see: one that they do not share is refused before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import pytest
from rich.progress import Progress

from distill_jobs.data import open as opening
from distill_jobs.data.captioned import index_folder
from distill_jobs.data.latent_cache import CacheKey, CacheWriter
from distill_jobs.data.shared_disk import check_shared
from distill_jobs.errors import DataError
from distill_jobs.latent_sections import GlyphData, ImageFolderData
from distill_jobs.processes import Processes
from tests.support import captioned_images as images

T = TypeVar("T")


class Second:
    """The second process of two; the first works in the folder ``there``, perhaps on another machine."""

    count, index = 2, 1

    def __init__(self, there: Path) -> None:
        self._there = there

    def first(self, work: Callable[[], T]) -> T:
        with chdir(self._there):
            return work()

    def any(self, *flags: bool) -> list[bool]:
        return list(flags)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Processes:
    """A second process on another machine than the first."""
    for machine in ("first", "second"):
        (tmp_path / machine).mkdir()
    monkeypatch.chdir(tmp_path / "second")
    return cast(Processes, Second(tmp_path / "first"))


def unreached(*_: object, **__: object) -> Any:
    raise AssertionError("nothing is to be computed")


def test_a_folder_that_all_see_is_let_pass_and_left_as_it_was(tmp_path: Path) -> None:
    check_shared(tmp_path / "cache", "data.cache", cast(Processes, Second(tmp_path)))
    assert not list((tmp_path / "cache").iterdir())


def test_a_folder_that_the_first_may_not_write_is_let_pass(tmp_path: Path, elsewhere: Processes) -> None:
    (tmp_path / "first" / "cache").write_text("no folder: stands for one on a disk that is read-only")
    check_shared(Path("cache"), "data.cache", elsewhere)


def test_latents_are_not_computed_into_a_cache_that_is_not_shared(
    tmp_path: Path, elsewhere: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ImageFolderData(kind="image_folder", path=str(images.image_folder(tmp_path / "a", 2)))
    monkeypatch.setattr(opening, "encoders_sha256", unreached)
    teacher = cast(Any, SimpleNamespace(size_px=8, zeros_for_empty=False))
    cached = opening._Cached(data, teacher, elsewhere, Progress(disable=True), None)
    with pytest.raises(DataError, match=r"^data\.cache: runs/latents is not the same folder for all processes"):
        cached.latents(index_folder(Path(data.path)), "latents")
    assert not list((tmp_path / "first" / "runs" / "latents").iterdir())


def test_glyphs_are_not_drawn_into_a_folder_that_is_not_shared(
    elsewhere: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "drawn", unreached)
    data = GlyphData(kind="glyphs", path="runs/glyphs")
    with pytest.raises(DataError, match=r"^data\.path: runs/glyphs is not the same folder"):
        opening.entries_of(data, 0, elsewhere, Progress(disable=True))


def test_a_shard_that_another_process_wrote_elsewhere_is_named(tmp_path: Path) -> None:
    entries = index_folder(images.image_folder(tmp_path / "a", 2))
    with pytest.raises(DataError, match=r"data\.cache: .*safetensors, which a process of this job has written"):
        CacheWriter(tmp_path / "cache", CacheKey("e", 8), entries, False).finished()
