"""Plans of a real library on a real GPU: only a whole one that was built for this very GPU is run.

As tests/unit/engines/test_plan_store.py and test_tensorrt.py have it of files and libraries of their own.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.backends import load, tensorrt
from engines.backends.cuda import find_device
from engines.backends.load import engine_key, load_backend
from engines.backends.plan_store import Kind, PlanStore
from engines.bundle import Bundle
from engines.condition import load_tokenizer
from engines.examples import example_inputs
from tests.gpu.loading import skip_unless_possible

pytestmark = pytest.mark.gpu
RUNGS = (1, 2, 4)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The plans that this process builds from now on."""
    skip_unless_possible("tensorrt")
    plans: list[bytes] = []

    def build_plan(*arguments: Any) -> bytes:
        plans.append(build(*arguments))
        return plans[-1]

    build = tensorrt.build_plan
    monkeypatch.setattr(tensorrt, "build_plan", build_plan)
    return plans


def kept(toy: Bundle, cache: Path) -> PlanStore:
    return PlanStore(cache, engine_key(toy, "step", "tensorrt", "auto", 0), RUNGS)


def check_start(toy: Bundle, cache: Path) -> None:
    """An engine that is started with this cache computes what the reference does."""
    inputs = example_inputs(toy.manifest, load_tokenizer(toy), "step", 2)
    expected = load_backend("onnxruntime", toy, "step").run(inputs)
    engine = load_backend("tensorrt", toy, "step", cache_dir=cache, rungs=RUNGS)
    got = engine.run(inputs)
    engine.close()
    for name, array in expected.items():
        assert np.abs(got[name] - array).max() <= 1e-3, name


BUILDER = """
import sys
from pathlib import Path
from engines.backends import tensorrt
from engines.backends.load import load_backend
from engines.bundle import verify_bundle

def build_plan(*arguments):
    print("building", flush=True)
    plan = build(*arguments)
    print("built", flush=True)
    return plan

build, tensorrt.build_plan = tensorrt.build_plan, build_plan
load_backend("tensorrt", verify_bundle(Path(sys.argv[1])), "step", cache_dir=Path(sys.argv[2]), rungs=(1, 2, 4))
"""


def test_a_build_killed_midway_leaves_nothing_to_run(toy: Bundle, tmp_path: Path, built: list[bytes]) -> None:
    words = [sys.executable, "-c", BUILDER, str(toy.path), str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "building\n"
        os.kill(process.pid, signal.SIGKILL)
        assert process.stdout.read() == ""
    store = kept(toy, tmp_path)
    assert store.load("plan") is None
    check_start(toy, tmp_path)
    assert built == [store.load("plan")]
    assert not list(tmp_path.rglob("*.partial"))


def flipped(data: bytes) -> bytes:
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize("damage", [flipped, cut])
@pytest.mark.parametrize(("kind", "builds"), [("plan", 2), ("kernels", 1)])
def test_what_was_damaged_is_made_again(
    toy: Bundle, tmp_path: Path, built: list[bytes], kind: Kind, builds: int, damage: Callable[[bytes], bytes]
) -> None:
    check_start(toy, tmp_path)
    store = kept(toy, tmp_path)
    if store.load(kind) is None and kind == "kernels":
        pytest.skip("tensorrt has all kernels in its plan")
    store.file(kind).write_bytes(damage(store.file(kind).read_bytes()))
    assert store.load(kind) is None
    check_start(toy, tmp_path)
    assert len(built) == builds
    assert store.load(kind) is not None


def test_a_plan_of_another_gpu_is_not_run(
    toy: Bundle, tmp_path: Path, built: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_start(toy, tmp_path)
    theirs, device = kept(toy, tmp_path), replace(find_device(), name="NVIDIA of another name")
    for place in (load, tensorrt):
        monkeypatch.setattr(place, "find_device", lambda: device)
    ours = kept(toy, tmp_path)
    ours.file("plan").parent.mkdir(parents=True)
    shutil.copy(theirs.file("plan"), ours.file("plan"))  # swapped in by hand
    assert ours.load("plan") is None
    check_start(toy, tmp_path)
    assert len(built) == 2
    assert ours.load("plan") == built[1]
