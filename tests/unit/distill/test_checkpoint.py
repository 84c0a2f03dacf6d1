"""Checkpoints survive truncation, bit flips and kills; the newest intact one is used."""

import ctypes
import hashlib
import os
from multiprocessing.queues import Queue
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
from distill_jobs.errors import StorageError
from tests.support.job_process import context


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


def test_those_of_stops_push_none_out_that_a_rewind_needs(tmp_path: Path) -> None:
    for update in (5, 10, 11, 12, 13):
        write_checkpoint(tmp_path, Checkpoint(update, 1.5, {}), every=5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000010", "00000012", "00000013"]
    assert intact_checkpoint(tmp_path, every=5) == tmp_path / "00000010"
    assert intact_checkpoint(tmp_path) == tmp_path / "00000013"


def test_no_folder_means_no_checkpoint(tmp_path: Path) -> None:
    assert intact_checkpoint(tmp_path / "missing") is None


FILES = (STATE, DIGEST)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_passed_over_loudly(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 10, 20)
    file = tmp_path / "00000020" / name
    data = file.read_bytes()
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        file.write_bytes(bytes(flipped))
        caplog.clear()
        assert newest(tmp_path).update == 10
        assert "00000020 is damaged" in caplog.text
    file.write_bytes(data)
    assert newest(tmp_path).update == 20


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_passed_over_loudly(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 10, 20)
    file = tmp_path / "00000020" / name
    data = file.read_bytes()
    for length in {0, 1, 8, len(data) // 2, len(data) - 1}:
        file.write_bytes(data[:length])
        assert newest(tmp_path).update == 10
    file.unlink()
    assert newest(tmp_path).update == 10
    assert caplog.text.count("damaged") == 6 or len(data) < 16


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self._target = str(target)

    def __reduce__(self) -> tuple[object, ...]:
        return open, (self._target, "w")


def test_a_pickle_is_refused_unread_even_with_its_right_hash(tmp_path: Path) -> None:
    write(tmp_path, 10, 20)
    state = tmp_path / "00000020" / STATE
    torch.save({"network.w": Payload(tmp_path / "ran")}, state)
    (state.parent / DIGEST).write_text(hashlib.sha256(state.read_bytes()).hexdigest())
    assert newest(tmp_path).update == 10
    assert not (tmp_path / "ran").exists()


def test_leftovers_of_killed_writes_are_cleared(tmp_path: Path) -> None:
    (tmp_path / ".00000013.writing").mkdir()
    write(tmp_path, 10)
    assert [p.name for p in tmp_path.iterdir()] == ["00000010"]


def on_a_full_disk(mount: Path, out: "Queue[str]") -> None:
    """In a mount namespace of its own: checkpoints on a small tmpfs until it is full, then with more room."""
    libc = ctypes.CDLL(None, use_errno=True)
    clone_newns, clone_newuser, remount = 0x0002_0000, 0x1000_0000, 0x20
    flags = clone_newns if os.geteuid() == 0 else clone_newns | clone_newuser
    if libc.unshare(flags) or libc.mount(b"none", b"/", None, (1 << 18) | (1 << 14), None):
        out.put(f"no mount namespace here: {os.strerror(ctypes.get_errno())}")
        return
    if libc.mount(b"tmpfs", bytes(mount), b"tmpfs", 0, b"size=1m"):
        out.put(f"no tmpfs here: {os.strerror(ctypes.get_errno())}")
        return
    big = {"network.w": torch.zeros(100_000)}
    try:
        for update in (10, 20, 30, 40):
            write_checkpoint(mount, Checkpoint(update, 1.0, big))
    except StorageError as error:
        out.put(str(error))
    out.put(", ".join(sorted(p.name for p in mount.iterdir())))
    out.put(str(newest(mount).update))
    libc.mount(b"tmpfs", bytes(mount), b"tmpfs", remount, b"size=4m")
    write_checkpoint(mount, Checkpoint(40, 1.0, big))
    out.put(str(newest(mount).update))


def test_a_full_disk_leaves_what_was_written_and_nothing_else(tmp_path: Path) -> None:
    out: Queue[str] = context.Queue()
    process = context.Process(target=on_a_full_disk, args=(tmp_path, out))
    process.start()
    said = out.get(timeout=300)
    if said.startswith("no "):
        pytest.skip(said)
    assert "No space left on device" in said
    assert [out.get(timeout=300) for _ in range(3)] == ["00000010, 00000020", "20", "40"]
    process.join(300)


def test_a_write_that_dies_midway_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "teacher"
    write_folder(target, lambda staging: (staging / "a").write_text("old") and None)

    def die(staging: Path) -> None:
        (staging / "a").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(target, die)
    assert (target / "a").read_text() == "old"
