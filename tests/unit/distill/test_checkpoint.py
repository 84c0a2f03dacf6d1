"""Checkpoints survive truncation, bit flips and kills; the newest intact one is used."""

from pathlib import Path

import pytest
import torch

from distill_jobs.checkpoint import (
    DIGEST,
    STATE,
    Checkpoint,
    intact_checkpoint,
    load_checkpoint,
    write_checkpoint,
    write_folder,
)


def write(folder: Path, *updates: int) -> None:
    for update in updates:
        write_checkpoint(folder, Checkpoint(update, 1.5, {"network.w": torch.full((4,), float(update))}))


def newest(folder: Path) -> Checkpoint:
    path = intact_checkpoint(folder)
    assert path is not None
    return load_checkpoint(path)


def test_the_newest_is_read_and_two_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 10, 20, 30)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000020", "00000030"]
    checkpoint = newest(tmp_path)
    assert (checkpoint.update, checkpoint.seconds) == (30, 1.5)
    assert torch.equal(checkpoint.tensors["network.w"], torch.full((4,), 30.0))


def test_no_folder_means_no_checkpoint(tmp_path: Path) -> None:
    assert intact_checkpoint(tmp_path / "missing") is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "no_digest"])
def test_a_damaged_one_is_passed_over_loudly(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 10, 20)
    state = tmp_path / "00000020" / STATE
    data = bytearray(state.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        state.write_bytes(bytes(data))
    elif damage == "truncate":
        state.write_bytes(bytes(data[:10]))
    else:
        (tmp_path / "00000020" / DIGEST).unlink()
    checkpoint = newest(tmp_path)
    assert checkpoint.update == 10
    assert "damaged" in caplog.text


def test_a_write_that_dies_midway_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "teacher"
    write_folder(target, lambda staging: (staging / "a").write_text("old") and None)

    def die(staging: Path) -> None:
        (staging / "a").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(target, die)
    assert (target / "a").read_text() == "old"
