"""A cache that takes nothing more: told, and no reason to stop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engines.cache import open_cache
from engines.errors import BackendError

FULL = """
import resource, signal, sys

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))  # writing further fails, as on a full disk
"""

OPENS = """
from pathlib import Path
from engines.cache import open_cache
from engines.errors import BackendError

try:
    open_cache(Path(sys.argv[1]))
except BackendError as error:
    print(error)
"""

RUNS = """
from pathlib import Path
from engines.backends.load import load_backend
from engines.bundle import verify_bundle
from engines.condition import load_tokenizer
from engines.examples import example_inputs

bundle = verify_bundle(Path(sys.argv[1]))
engine = load_backend("openvino", bundle, "step_4", threads=1, cache_dir=Path(sys.argv[2]))
inputs = example_inputs(bundle.manifest, load_tokenizer(bundle), "step_4", 2)
print(engine.run(inputs)["next_latent"].tobytes().hex())
"""


def python(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)


def test_a_cache_that_was_opened_takes_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_cache(Path("~/a/b")) == tmp_path / "a" / "b"
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_no_folder_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BackendError, match=r"nothing can be kept in .*/file/cache: .*; choose another cache"):
        open_cache(tmp_path / "file" / "cache")


def test_a_full_disk_is_refused_with_the_reason(tmp_path: Path) -> None:
    said = python(FULL.format(room=1024) + OPENS, tmp_path).stdout
    assert said.startswith(f"nothing can be kept in {tmp_path}: ")


@pytest.mark.parametrize("room", [0, 1024], ids=["not even for a hash", "less than a model"])
def test_on_a_full_disk_openvino_runs_and_says_that_nothing_is_kept(
    toy_bundle: Path, tmp_path: Path, room: int
) -> None:
    whole = python("import sys\n" + RUNS, toy_bundle, tmp_path / "roomy")
    assert "not kept" not in whole.stderr
    full = python(FULL.format(room=room) + RUNS, toy_bundle, tmp_path / "full")
    assert full.stdout == whole.stdout
    assert f"step_4.onnx is compiled, but not kept in {tmp_path}/full/" in full.stderr
    assert [file.name for file in tmp_path.glob("full/*/models/*")] == ["lock"]
