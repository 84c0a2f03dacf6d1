"""Captioned images: both forms give the same rows; what is wrong is named."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from distill_jobs.data import framing
from distill_jobs.data.captioned import index_folder, index_shards
from distill_jobs.data.framing import frame, framed, pixels_of
from distill_jobs.errors import DataError
from tests.support import captioned_images as images


def test_folders_and_shards_give_the_same_rows(tmp_path: Path) -> None:
    lines = index_folder(images.image_folder(tmp_path / "lines", 5))
    table = index_folder(images.image_folder(tmp_path / "table", 5, parquet=True))
    shards = index_shards(str(images.shards(tmp_path / "shards", (3, 2))))
    named = index_shards(str(tmp_path / "shards" / "{000..001}.tar"))
    assert shards == named
    for form in (lines, table, shards):
        assert [entry.read() for entry in form] == [images.encoded(i, images.SIDES[i % 3]) for i in range(5)]
        assert [entry.caption for entry in form] == [images.caption(i) for i in range(5)]
        assert [entry.digest() for entry in form] == [entry.digest() for entry in lines]


def test_a_digest_covers_image_and_caption(tmp_path: Path) -> None:
    folder = images.image_folder(tmp_path / "a", 2)
    before = [entry.digest() for entry in index_folder(folder)]
    (folder / "1.png").write_bytes(images.encoded(7))
    text = (folder / "metadata.jsonl").read_text().replace("dog number 0", "dog number zero")
    (folder / "metadata.jsonl").write_text(text)
    after = [entry.digest() for entry in index_folder(folder)]
    assert before[0] != after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"file_name": "gone.png", "text": "a"}', "gone.png is not in the folder"),
        ('{"file_name": "../a.png", "text": "a"}', "outside the folder"),
        ('{"file_name": "0.png"}', "jsonl:2: a row needs file_name and text"),
        ('{"file_name": "0.png", "text": " "}', "jsonl:2: the caption is empty"),
        ("{", "jsonl:2 is not JSON"),
        ("[]", "jsonl:2 is not a JSON object"),
    ],
)
def test_wrong_rows_are_named(row: str, message: str, tmp_path: Path) -> None:
    folder = images.image_folder(tmp_path / "a", 1)
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(row + "\n")
    with pytest.raises(DataError, match=message):
        index_folder(folder)


def test_folders_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither metadata\.jsonl nor metadata\.parquet"):
        index_folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(DataError, match="lists no images"):
        index_folder(tmp_path)
    with pytest.raises(DataError, match="holds no tar shards"):
        index_shards(str(tmp_path))


def test_wrong_shards_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        images._add(shard, "a.png", images.encoded(0))
    with pytest.raises(DataError, match=r"a\.png has no caption beside it"):
        index_shards(str(tmp_path))
    (tmp_path / "0.tar").write_bytes(b"not a tar file" * 100)
    with pytest.raises(DataError, match=r"0\.tar is not an uncompressed tar file"):
        index_shards(str(tmp_path))
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        images._add(shard, "a.png", images.encoded(0))
        images._add(shard, "a.json", json.dumps({"title": "x"}).encode())
    with pytest.raises(DataError, match=r"a\.json has neither text nor caption"):
        index_shards(str(tmp_path))


def test_a_caption_may_hold_any_line_separator(tmp_path: Path) -> None:
    folder = images.image_folder(tmp_path / "a", 2)
    rows = [{"file_name": f"{i}.png", "text": f"one\u2028two\x85three {i}"} for i in range(2)]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert [entry.caption for entry in index_folder(folder)] == [row["text"] for row in rows]


def test_metadata_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = images.image_folder(tmp_path / "a", 1)
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "0.png", "text": "caf\xe9"}')
    with pytest.raises(DataError, match=r"metadata\.jsonl is not UTF-8"):
        index_folder(folder)
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(DataError, match=r"metadata\.parquet is not a parquet file"):
        index_folder(folder)
    pq.write_table(pa.Table.from_pylist([{"file_name": "0.png", "caption": "a"}]), folder / "metadata.parquet")
    with pytest.raises(DataError, match=r"metadata\.parquet.*text"):
        index_folder(folder)


@pytest.mark.parametrize(
    "past", [-1, 0, 100, 512, 600], ids=["in data", "between", "in a header", "after it", "text"]
)
def test_a_shard_that_was_cut_off_is_named(past: int, tmp_path: Path) -> None:
    folder = images.shards(tmp_path / "shards", (2,))
    with tarfile.open(folder / "000.tar") as shard:
        third = shard.getmembers()[2]
    whole = (folder / "000.tar").read_bytes()
    (folder / "000.tar").write_bytes(whole[: third.offset + past])
    with pytest.raises(DataError, match=r"000\.tar.*cut off after 000.*unreadable: skip"):
        index_shards(str(folder))
    first, lost = index_shards(str(folder), skip=True)
    assert (first.caption, first.read()) == (images.caption(0), images.encoded(0, images.SIDES[0]))
    assert lost.name.startswith(f"{folder / '000.tar'}, cut off after 0")
    with pytest.raises(DataError, match=r"cut off after 0.*not an image"):
        framed(lost, 8)


def test_an_empty_caption_of_a_shard_is_named(tmp_path: Path) -> None:
    for name, data in (("a.txt", b" \n"), ("a.JSON", b'{"text": ""}')):
        with tarfile.open(tmp_path / "0.tar", "w") as shard:
            images._add(shard, "a.png", images.encoded(0))
            images._add(shard, name, data)
        with pytest.raises(DataError, match=rf"0\.tar: {name}: the caption is empty"):
            index_shards(str(tmp_path))


def test_an_image_that_shrank_is_noticed(tmp_path: Path) -> None:
    folder = images.image_folder(tmp_path / "a", 1)
    [entry] = index_folder(folder)
    (folder / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match="has changed"):
        entry.read()


def png(pixels: np.ndarray, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_middle_is_cut_out_and_told() -> None:
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = 255
    framed = frame(png(pixels), 8)
    torch.testing.assert_close(framed.pixels, torch.ones(3, 8, 8))
    assert framed.time_ids.tolist() == [8, 24, 0, 8, 8, 8]
    assert frame(png(pixels), 16).time_ids.tolist() == [8, 24, 0, 16, 16, 16]
    assert frame(png(pixels), 4).pixels.shape == (3, 4, 4)


def test_transparency_is_white_and_grey_becomes_rgb() -> None:
    clear = np.zeros((4, 4, 4), np.uint8)
    torch.testing.assert_close(frame(png(clear, "RGBA"), 4).pixels, torch.ones(3, 4, 4))
    grey = np.full((4, 4), 255, np.uint8)
    torch.testing.assert_close(frame(png(grey, "L"), 4).pixels, torch.ones(3, 4, 4))


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 255], [32896, 65535]], np.uint16)).save(buffer, "PNG")
    levels = (frame(buffer.getvalue(), 2).pixels[0] + 1) * 127.5
    torch.testing.assert_close(levels, torch.tensor([[0.0, 1.0], [128.0, 255.0]]))


def test_images_read_together_come_in_their_order_or_are_named(tmp_path: Path) -> None:
    entries = index_folder(images.image_folder(tmp_path / "images", 9))
    each = [frame(entry.read(), 8).pixels for entry in entries]
    assert torch.equal(pixels_of(entries, 8), torch.stack(each))
    entries[4].file.write_bytes(b"x" * entries[4].size)
    with pytest.raises(DataError, match=entries[4].name):
        pixels_of(entries, 8)


def test_an_image_of_too_many_pixels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(framing, "MOST_PIXELS", 100)
    with pytest.raises(DataError, match="12 × 10 pixels"):
        frame(images.encoded(0, (12, 10)), 8)


def test_an_image_too_narrow_for_its_square_is_refused_before_it_fills_the_memory() -> None:
    data = images.encoded(0, (1, 50_000))
    assert frame(data, 8).pixels.shape == (3, 8, 8)
    with pytest.raises(DataError, match="1 × 50000 pixels, too narrow for a square of 1024"):
        frame(data, 1024)


def test_pixels_without_a_largest_value_are_refused() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(buffer, "TIFF")
    with pytest.raises(DataError, match="mode F have no largest value"):
        frame(buffer.getvalue(), 4)


@pytest.mark.parametrize("data", [b"", b"no image", images.encoded(0)[:200]], ids=["empty", "text", "cut off"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match=r"not an image that can be read: (it has no format|image file is trunc)"):
        frame(data, 8)


def test_images_may_be_links_to_elsewhere(tmp_path: Path) -> None:
    """As in snapshots of a hub's cache, and in content stores."""
    folder = images.image_folder(tmp_path / "a", 1)
    blob = tmp_path / "blobs" / "0f3a"
    blob.parent.mkdir()
    (folder / "0.png").rename(blob)
    (folder / "0.png").symlink_to(blob)
    assert [entry.read() for entry in index_folder(folder)] == [blob.read_bytes()]


@pytest.mark.parametrize("order", [("txt", "json"), ("json", "txt")])
@pytest.mark.parametrize("beside", [{"caption": "of the json"}, {"width": 64}])
def test_of_two_captions_of_one_image_the_txt_counts(
    order: tuple[str, str], beside: dict[str, Any], tmp_path: Path
) -> None:
    told = {"txt": b"of the txt", "json": json.dumps(beside).encode()}
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        images._add(shard, "a.png", images.encoded(0))
        for extension in order:
            images._add(shard, f"a.{extension}", told[extension])
    assert [entry.caption for entry in index_shards(str(tmp_path))] == ["of the txt"]


def test_a_caption_of_a_shard_without_an_image_is_named_or_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        images._add(shard, "a.gif", b"GIF89a")
        images._add(shard, "a.txt", b"a dog")
        images._add(shard, "a.json", b"{}")
        images._add(shard, "b.png", images.encoded(0))
        images._add(shard, "b.txt", b"a cat")
    with pytest.raises(DataError, match=r"0\.tar: a has a caption and no image \(jpg, jpeg, png, webp\)"):
        index_shards(str(tmp_path))
    (cat,) = index_shards(str(tmp_path), skip=True)
    assert cat.caption == "a cat"
    assert "0.tar: 1 captions without an image are left out, a first" in caplog.text


def test_two_images_of_one_caption_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        for name in ("a.png", "a.webp"):
            images._add(shard, name, images.encoded(0))
        images._add(shard, "a.txt", b"a dog")
    with tarfile.open(tmp_path / "1.tar", "w") as shard:  # added again, as tar -r does: the later one counts
        for k in range(2):
            images._add(shard, "a.png", images.encoded(k))
        images._add(shard, "a.txt", b"a dog")
    (later,) = index_shards(str(tmp_path / "{001..001}.tar").replace("001..001", "1..1"))
    assert later.read() == images.encoded(1)
    with pytest.raises(DataError, match=r"0\.tar has two images of one caption, a\.png and a\.webp"):
        index_shards(str(tmp_path))
