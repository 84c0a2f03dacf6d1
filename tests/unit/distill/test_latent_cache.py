"""Cached latents: a function of the images, the captions and the encoders; interrupted, they go on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from distill_jobs.data import framing, latent_cache, seen
from distill_jobs.data.captioned import Captioned, index_folder
from distill_jobs.data.framing import Framed, frame
from distill_jobs.data.latent_cache import CacheKey, CacheWriter
from distill_jobs.data.latents import LatentSource
from distill_jobs.data.masked_latents import MaskedLatentSource
from distill_jobs.data.source import Condition
from distill_jobs.draws import Draws
from distill_jobs.errors import DataError, JobError, StorageError
from distill_jobs.pipelines.vae import Encoded
from distill_jobs.sections import InpaintingSection
from engines.masks import HIDDEN
from tests.support import captioned_images as images

COUNT = 7


class Halves:
    """Stands in for the networks: every second pixel as latent, captions' lengths as tokens."""

    def __init__(self) -> None:
        self.images = 0

    def latents(self, pixels: Tensor) -> Encoded:
        self.images += len(pixels)
        mean = pixels[:, :1, ::2, ::2]
        return Encoded(mean, torch.full_like(mean, 0.5))

    def condition(self, captions: Sequence[str], time_ids: Tensor) -> Condition:
        lengths = torch.tensor([[float(len(caption))] for caption in captions])
        return Condition(lengths[:, None].expand(-1, 3, 2), lengths, time_ids)

    def null(self) -> Condition:
        return Condition(torch.zeros(1, 3, 2), torch.zeros(1, 1))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_cache, "SHARD_ROWS", 3)
    monkeypatch.setattr(latent_cache, "ENCODED_ROWS", 2)


def writer(tmp_path: Path, entries: Sequence[Captioned], encoders: str = "e", *, skip: bool = False) -> CacheWriter:
    return CacheWriter(tmp_path / "cache", CacheKey(encoders, 8), entries, skip)


def filled(made: CacheWriter, index: int = 0, of: int = 1) -> int:
    """Fill the cache; how many images were encoded."""
    encoders = Halves()
    made.write(lambda: encoders, lambda _: None, index, of)
    return encoders.images


def test_rows_are_what_the_encoders_gave(tmp_path: Path) -> None:
    entries = index_folder(images.image_folder(tmp_path / "a", COUNT))
    made = writer(tmp_path, entries)
    assert filled(made) == COUNT
    cache = made.finished()
    assert (len(cache), cache.skipped) == (COUNT, ())
    encoded, condition = cache.rows(torch.tensor([6, 0, 3, 3]))
    for row, index in enumerate([6, 0, 3, 3]):
        framed = frame(entries[index].read(), 8)
        torch.testing.assert_close(encoded.mean[row], framed.pixels[:1, ::2, ::2], rtol=0, atol=1e-3)
        assert condition.tokens[row].unique().tolist() == [len(images.caption(index))]
        assert condition.time_ids is not None
        torch.testing.assert_close(condition.time_ids[row], framed.time_ids)


def test_a_second_job_computes_nothing(tmp_path: Path) -> None:
    entries = index_folder(images.image_folder(tmp_path / "a", COUNT))
    filled(writer(tmp_path, entries))
    assert filled(writer(tmp_path, entries)) == 0
    assert filled(writer(tmp_path, entries, encoders="others")) == COUNT


def test_what_changed_is_computed_again(tmp_path: Path) -> None:
    folder = images.image_folder(tmp_path / "a", COUNT)
    filled(writer(tmp_path, index_folder(folder)))
    (folder / "4.png").write_bytes(images.encoded(99))
    assert filled(writer(tmp_path, index_folder(folder))) == 3


def test_rows_of_other_code_are_computed_again_and_are_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = index_folder(images.image_folder(tmp_path / "a", COUNT))
    filled(writer(tmp_path, entries))
    before = writer(tmp_path, entries).finished()
    monkeypatch.setattr(latent_cache, "ROWS_VERSION", latent_cache.ROWS_VERSION + 1)
    assert filled(writer(tmp_path, entries)) == COUNT
    after = writer(tmp_path, entries).finished()
    assert not set(after.files) & set(before.files)
    assert len(list((tmp_path / "cache").rglob("null-*"))) == 2
    assert after.identity == before.identity


def test_jobs_of_one_pid_that_share_a_cache_write_each_its_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pods do, where every job's first process has the same number."""
    entries = index_folder(images.image_folder(tmp_path / "a", 1))
    save, staged = latent_cache.save_file, set[Path]()

    def both_at_once(columns: object, file: Path, **rest: object) -> None:
        staged.add(file)
        if len(staged) == 1:
            filled(writer(tmp_path, entries))
        save(columns, file, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(latent_cache, "save_file", both_at_once)
    filled(writer(tmp_path, entries))
    assert len(staged) == 3  # the empty condition by either, the shard by one
    assert len(writer(tmp_path, entries).finished()) == 1


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the images that were read."""
    names, read = list[str](), Captioned.read

    def counted(entry: Captioned) -> bytes:
        names.append(entry.file.name)
        return read(entry)

    monkeypatch.setattr(Captioned, "read", counted)
    return names


def test_who_comes_back_reads_the_images_of_changed_files_alone(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seen, "SETTLED_S", -1.0)
    entries = index_folder(images.image_folder(tmp_path / "a", COUNT))
    filled(first := writer(tmp_path, entries))
    reads.clear()
    assert filled(again := writer(tmp_path, entries)) == 0
    assert (reads, again.finished().identity) == ([], first.finished().identity)
    changed = entries[4].file
    changed.write_bytes(entries[5].file.read_bytes())
    entries = index_folder(tmp_path / "a")
    assert filled(third := writer(tmp_path, entries)) == 3
    assert set(reads) == {entry.file.name for entry in entries[3:6]}
    assert third.finished().identity != first.finished().identity
    renamed = [replace(entry, caption="another") if place == 6 else entry for place, entry in enumerate(entries)]
    assert filled(writer(tmp_path, renamed)) == 1
    assert filled(writer(tmp_path, entries, "others")) == COUNT


def test_a_file_changed_a_moment_ago_is_read_again(tmp_path: Path, reads: list[str]) -> None:
    entries = index_folder(images.image_folder(tmp_path / "a", COUNT))
    filled(writer(tmp_path, entries))
    reads.clear()
    stat = entries[0].file.stat()
    entries[0].file.write_bytes(bytes(reversed(entries[0].file.read_bytes())))
    os.utime(entries[0].file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(DataError, match=r"0\.png"):
        filled(writer(tmp_path, entries))


def test_a_cache_that_cannot_be_written_still_serves(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seen, "SETTLED_S", -1.0)
    entries = index_folder(images.image_folder(tmp_path / "a", COUNT))
    monkeypatch.setattr(seen, "write_text", _full)
    filled(writer(tmp_path, entries))
    reads.clear()
    assert filled(writer(tmp_path, entries)) == 0
    assert len(reads) == COUNT


def _full(*_: object) -> None:
    raise StorageError("no space left")


def test_the_next_images_are_decoded_while_a_batch_is_encoded_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_cache, "SHARD_ROWS", COUNT)
    entries = index_folder(images.image_folder(tmp_path / "a", COUNT))
    read, seen = Captioned.read, [Event() for _ in entries]

    class Waits(Halves):
        def latents(self, pixels: Tensor) -> Encoded:
            encoded = super().latents(pixels)
            ahead = min(self.images + 2, COUNT)
            assert all(event.wait(60) for event in seen[:ahead])
            assert not any(event.is_set() for event in seen[ahead:])
            return encoded

    def decoded(entry: Captioned, side: int) -> Framed:
        seen[entries.index(entry)].set()
        return frame(read(entry), side)

    monkeypatch.setattr(framing, "framed", decoded)
    writer(tmp_path, entries).write(Waits, lambda _: None, 0, 1)


def test_where_memory_ends_fewer_rows_are_encoded_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_cache, "ENCODED_ROWS", 3)
    entries = index_folder(images.image_folder(tmp_path / "a", COUNT))
    filled(writer(tmp_path / "roomy", entries))
    tried = []

    class Small(Halves):
        def latents(self, pixels: Tensor) -> Encoded:
            tried.append(len(pixels))
            if len(pixels) > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return super().latents(pixels)

        room = 1

    made = writer(tmp_path, entries)
    made.write(Small, lambda _: None, 0, 1)
    assert tried == [3] + [1] * COUNT
    found, expected = (m.finished().rows(torch.arange(COUNT)) for m in (made, writer(tmp_path / "roomy", entries)))
    torch.testing.assert_close(found[0].mean, expected[0].mean, rtol=0, atol=0)
    torch.testing.assert_close(found[1].tokens, expected[1].tokens, rtol=0, atol=0)
    monkeypatch.setattr(Small, "room", 0)
    with pytest.raises(JobError, match="too little memory on the device to encode an image of 8 pixels"):
        writer(tmp_path, entries, "others").write(Small, lambda _: None, 0, 1)


def test_an_empty_caption_that_is_zeros_is_another_than_an_encoded_one(tmp_path: Path) -> None:
    entries = index_folder(images.image_folder(tmp_path / "images", COUNT))
    encoded, zeros = (
        CacheWriter(tmp_path / "cache", CacheKey("e", 8, each), entries, False) for each in (False, True)
    )
    filled(encoded)
    assert filled(zeros) == 0  # the images are the same
    assert len(list((tmp_path / "cache").rglob("null-*"))) == 2


def test_an_interrupted_cache_goes_on(tmp_path: Path) -> None:
    entries = index_folder(images.image_folder(tmp_path / "a", COUNT))

    class Stops(Halves):
        def latents(self, pixels: Tensor) -> Encoded:
            if self.images >= 4:
                raise KeyboardInterrupt
            return super().latents(pixels)

    with pytest.raises(KeyboardInterrupt):
        writer(tmp_path, entries).write(Stops, lambda _: None, 0, 1)
    assert filled(writer(tmp_path, entries)) == COUNT - 3
    assert not list((tmp_path / "cache").rglob(".*"))


def test_processes_share_the_work(tmp_path: Path) -> None:
    entries = index_folder(images.image_folder(tmp_path / "a", COUNT))
    assert [filled(writer(tmp_path, entries), index, 2) for index in range(2)] == [4, 3]
    assert len(writer(tmp_path, entries).finished()) == COUNT


def test_no_process_reads_the_images_of_others_once_they_told_the_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = index_folder(images.image_folder(tmp_path / "a", COUNT))
    ours = [writer(tmp_path, entries) for _ in range(2)]
    for index, made in enumerate(ours):
        filled(made, index, 2)
    assert [set(made.names) for made in ours] == [{0, 2}, {1}]
    expected = writer(tmp_path, entries).finished()
    ours[0].names |= ours[1].names
    monkeypatch.setattr(Captioned, "read", None)
    assert ours[0].finished().files == expected.files


def test_unreadable_images_are_named_or_skipped_and_counted(tmp_path: Path) -> None:
    folder = images.image_folder(tmp_path / "a", COUNT)
    for index in (1, 3, 4, 5):
        (folder / f"{index}.png").write_bytes(b"x")
    entries = index_folder(folder)
    with pytest.raises(DataError, match=r"1\.png: not an image.*data\.unreadable: skip"):
        filled(writer(tmp_path, entries))
    made = writer(tmp_path, entries, skip=True)
    filled(made)
    cache = made.finished()
    assert len(cache) == 3
    assert cache.skipped == tuple(str(folder / f"{index}.png") for index in (1, 3, 4, 5))
    _, condition = cache.rows(torch.arange(3))
    assert condition.tokens[:, 0, 0].tolist() == [len(images.caption(i)) for i in (0, 2, 6)]
    assert cache.images(torch.tensor([2, 0, 1])) == [6, 0, 2]
    nothing = writer(tmp_path, entries[3:6], skip=True)
    filled(nothing)
    with pytest.raises(DataError, match="none of the images"):
        nothing.finished()


def test_a_file_that_was_cut_off_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entries = index_folder(images.image_folder(tmp_path / "a", COUNT))
    filled(writer(tmp_path, entries))
    kept = {file: file.read_bytes() for file in (tmp_path / "cache").rglob("*.safetensors")}
    encoded = []
    for file, whole in kept.items():
        file.write_bytes(whole[:-1])
        encoded.append(filled(writer(tmp_path, entries)))
        assert f"{file} are damaged" in caplog.text
        assert file.read_bytes() == whole
    assert sorted(encoded) == [0, 1, 3, 3]  # the empty condition, and three shards of 7 images


@pytest.mark.parametrize("value", [float("nan"), 70_000.0])
def test_latents_that_cannot_be_kept_are_named(value: float, tmp_path: Path) -> None:
    entries = index_folder(images.image_folder(tmp_path / "a", COUNT))

    class Broken(Halves):
        def latents(self, pixels: Tensor) -> Encoded:
            encoded = super().latents(pixels)
            if self.images == 5:  # the first two of the second shard
                encoded.mean[1, 0, 0, 0] = value
            return encoded

    encoders = Broken()
    with pytest.raises(DataError, match=r"4\.png: the teacher's encoders give NaN.*\(mean\)"):
        writer(tmp_path, entries).write(lambda: encoders, lambda _: None, 0, 1)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")]
)
def test_a_full_disk_is_a_storage_error(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = index_folder(images.image_folder(tmp_path / "a", 1))

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(latent_cache, "save_file", full)
    with pytest.raises(StorageError, match="No space left"):
        filled(writer(tmp_path, entries))


def test_a_cache_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(StorageError, match="cannot be written"):
        filled(writer(tmp_path, index_folder(images.image_folder(tmp_path / "a", COUNT))))


def test_batches_are_a_function_of_the_update(tmp_path: Path) -> None:
    entries = index_folder(images.image_folder(tmp_path / "a", COUNT))
    made = writer(tmp_path, entries)
    filled(made)
    source = LatentSource(made.finished(), (1, 4, 4), entries, 8)
    draws = Draws(3, "stage_one")
    whole = source.batch(draws, 5, 6)
    again = source.batch(Draws(3, "stage_one"), 5, 6)
    torch.testing.assert_close(whole.x, again.x, rtol=0, atol=0)
    parts = [source.batch(draws.share(k, 2), 5, 3) for k in range(2)]
    torch.testing.assert_close(whole.x, torch.cat([part.x for part in parts]), rtol=0, atol=0)
    torch.testing.assert_close(whole.condition.tokens, torch.cat([p.condition.tokens for p in parts]))
    epoch = torch.cat([source.batch(draws, update, 1).condition.tokens[:, 0, 0] for update in range(COUNT)])
    assert sorted(epoch.tolist()) == sorted(float(len(images.caption(i))) for i in range(COUNT))
    assert len(source.null(4)) == 4
    assert not torch.equal(whole.x, source.batch(draws, 6, 6).x)
    for update in (0, 1, 2, 3, 2, 3):  # as training asks for them, after a rewind too
        row, alone = source.batch(draws, update, 2), source.batch(Draws(3, "stage_one"), update, 2)
        assert torch.equal(row.x, alone.x)
        assert torch.equal(row.condition.tokens, alone.condition.tokens)


def test_masks_hide_the_image_that_the_row_was_made_from(tmp_path: Path) -> None:
    folder = images.image_folder(tmp_path / "a", COUNT)
    (folder / "1.png").write_bytes(b"x")
    entries = index_folder(folder)
    made = writer(tmp_path, entries, skip=True)
    filled(made)
    plain = LatentSource(made.finished(), (1, 4, 4), entries, 8)
    source = MaskedLatentSource(plain, InpaintingSection(), lambda pixels: pixels[:, :1, ::2, ::2])
    draws = Draws(3, "stage_one")
    rows, extra = plain.batch(draws, 2, 6), source.batch(draws, 2, 6).extra
    assert extra is not None
    mask, seen = extra[:, :1], extra[:, 1:]
    mean, _ = plain.cache.rows(draws.indices(2, 6, len(plain.cache)))
    torch.testing.assert_close(seen, torch.where(mask > 0, HIDDEN, mean.mean), rtol=0, atol=1e-3)
    assert set(mask.unique().tolist()) == {0, 1}
    torch.testing.assert_close(source.batch(draws, 2, 6).x, rows.x)
    again = torch.cat([source.batch(draws.share(k, 2), 2, 3).extra for k in range(2)])
    torch.testing.assert_close(again, extra, rtol=0, atol=0)
    torch.testing.assert_close(source.blank()[:, 1:], torch.full((1, 1, 4, 4), HIDDEN))
