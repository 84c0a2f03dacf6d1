"""Captioned images: both forms give the same rows; what is wrong is named."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distill_jobs.data.captioned import index_folder, index_shards
from distill_jobs.data.framing import frame
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


@pytest.mark.parametrize("data", [b"", b"no image", images.encoded(0)[:200]], ids=["empty", "text", "cut off"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="not an image that can be read"):
        frame(data, 8)
