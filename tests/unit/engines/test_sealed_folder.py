"""What OpenVINO keeps of compiled models: run only as it was written, else made again."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engines.backends.load import engine_key, load_backend
from engines.backends.sealed_folder import SEAL, SealedFolder
from engines.bundle import verify_bundle
from engines.condition import load_tokenizer
from engines.examples import example_inputs

GRAPH = "step_4"

KILLED = """
import os, signal, sys
from pathlib import Path
from engines.backends.sealed_folder import SealedFolder

with SealedFolder(Path(sys.argv[1])).in_use():
    (Path(sys.argv[1]) / "half.blob").write_bytes(b"half a model")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def run(bundle: Path, cache: Path) -> bytes:
    """The next latents of two rows, from an engine that was just loaded."""
    verified = verify_bundle(bundle)
    engine = load_backend("openvino", verified, GRAPH, threads=1, cache_dir=cache)
    inputs = example_inputs(verified.manifest, load_tokenizer(verified), GRAPH, 2)
    return engine.run(inputs)["next_latent"].tobytes()


def kept(bundle: Path, cache: Path) -> Path:
    """The one compiled model of the graph."""
    folder = engine_key(verify_bundle(bundle), GRAPH, "openvino", "auto", 1).folder(cache) / "models"
    (file,) = (file for file in folder.iterdir() if file.suffix == ".blob")
    return file


def killed_in(folder: Path) -> None:
    """A process that dies while its library writes."""
    ended = subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    assert (folder / "half.blob").exists()


@pytest.fixture
def cached(toy_bundle: Path, tmp_path: Path) -> Path:
    assert run(toy_bundle, tmp_path) == run(toy_bundle, tmp_path)
    return tmp_path


def test_a_kept_model_is_taken_as_it_is(toy_bundle: Path, cached: Path) -> None:
    before = kept(toy_bundle, cached).stat()
    run(toy_bundle, cached)
    after = kept(toy_bundle, cached).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("fault", ["altered", "cut", "no seal", "another seal", "writable by others"])
def test_a_model_that_is_not_as_it_was_written_is_made_again(
    toy_bundle: Path, cached: Path, fault: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = kept(toy_bundle, cached)
    whole, seal, before = file.read_bytes(), file.with_name(f"{file.name}{SEAL}"), file.stat()
    if fault == "altered":
        at = len(whole) // 3
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
    if fault == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    if fault == "no seal":
        seal.unlink()
    if fault == "another seal":
        seal.write_text("0" * 64)
    if fault == "writable by others":
        file.chmod(0o666)
    assert run(toy_bundle, cached) == run(toy_bundle, tmp_path_factory.mktemp("fresh"))
    after = kept(toy_bundle, cached)
    assert (after.stat().st_ino, after.stat().st_mtime_ns) != (before.st_ino, before.st_mtime_ns)
    assert after.stat().st_mode & 0o022 == 0


def test_a_killed_build_leaves_nothing_that_is_loaded(toy_bundle: Path, cached: Path) -> None:
    folder = kept(toy_bundle, cached).parent
    killed_in(folder)
    run(toy_bundle, cached)
    assert not (folder / "half.blob").exists()
    assert os.listdir(folder)


def test_what_another_process_left_half_written_is_not_sealed_by_one_that_lives(tmp_path: Path) -> None:
    """A worker that has been at it for long, and a build beside it that is killed."""
    worker = SealedFolder(tmp_path)
    with worker.in_use():
        (tmp_path / "first.blob").write_bytes(b"whole")
    killed_in(tmp_path)
    with worker.in_use():
        assert not (tmp_path / "half.blob").exists()
        (tmp_path / "second.blob").write_bytes(b"whole")
    with SealedFolder(tmp_path).in_use():
        assert {file.name for file in tmp_path.glob("*.blob")} == {"first.blob", "second.blob"}


def test_a_folder_that_another_uses_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is being written there has no seal yet, and would be swept."""
    lock, file = fcntl.flock, tmp_path / "a.blob"
    monkeypatch.setattr(fcntl, "flock", lambda opened, how: lock(opened, how | fcntl.LOCK_NB))
    with SealedFolder(tmp_path).in_use():
        file.write_bytes(b"half a model")
        with pytest.raises(BlockingIOError), SealedFolder(tmp_path).in_use():
            pass
        assert file.exists()
        file.write_bytes(b"whole")
    with SealedFolder(tmp_path).in_use():
        assert file.exists()


def test_what_a_failed_use_left_is_not_sealed_by_the_next_one(tmp_path: Path) -> None:
    folder = SealedFolder(tmp_path)

    def fails() -> None:
        with folder.in_use():
            (tmp_path / "half.blob").write_bytes(b"half a model")
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        fails()
    with folder.in_use():
        assert not (tmp_path / "half.blob").exists()


def test_a_file_altered_between_two_uses_is_removed(tmp_path: Path) -> None:
    folder, file = SealedFolder(tmp_path), tmp_path / "a.blob"
    with folder.in_use():
        file.write_bytes(b"whole")
    file.write_bytes(b"whole, and more")
    with folder.in_use():
        assert not file.exists()


def test_a_file_that_the_library_writes_anew_is_sealed_anew(tmp_path: Path) -> None:
    folder, file = SealedFolder(tmp_path), tmp_path / "a.blob"
    for content in (b"of the old driver", b"of the new one"):
        with folder.in_use():
            file.unlink(missing_ok=True)
            file.write_bytes(content)
    with SealedFolder(tmp_path).in_use():
        assert file.read_bytes() == b"of the new one"


def test_a_seal_without_its_file_is_removed(tmp_path: Path) -> None:
    with SealedFolder(tmp_path).in_use():
        (tmp_path / "a.blob").write_bytes(b"whole")
    (tmp_path / "a.blob").unlink()
    folder = SealedFolder(tmp_path)
    with folder.in_use():
        assert not list(tmp_path.glob(f"*{SEAL}"))
        (tmp_path / "a.blob").write_bytes(b"another, under the same name")
    with SealedFolder(tmp_path).in_use():
        assert (tmp_path / "a.blob").exists()


def test_a_file_whose_seal_finds_no_room_is_not_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = SealedFolder(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(Path, "replace", no_room)
        with folder.in_use():
            (tmp_path / "a.blob").write_bytes(b"whole")
    assert not folder.wrote
    with folder.in_use():
        assert not list(tmp_path.glob("a.blob*"))
