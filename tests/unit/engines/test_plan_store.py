"""A kept plan is run only where everything it was made from and for is the same: else it is built again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from engines.backends.plan_store import Kind, PlanStore, is_ours
from engines.cache import EngineKey
from engines.errors import BackendError

KEY = EngineKey(
    "a" * 64,
    "tensorrt 11.4.0.106 float32",
    "NVIDIA H100 80GB HBM3 sm_90, driver 580.65.06",
    0,
    source="d" * 64,
)
RUNGS = (1, 2, 4)
PLAN = bytes(range(256)) * 8


@pytest.fixture
def store(tmp_path: Path) -> PlanStore:
    return PlanStore(tmp_path, KEY, RUNGS)


class Library:
    """Takes any plan but those named; tells what it was given and how often it had to build."""

    def __init__(self, *refused: bytes) -> None:
        self.refused = refused
        self.loaded: list[bytes] = []
        self.builds = 0

    def load(self, plan: bytes) -> bytes | None:
        self.loaded.append(plan)
        return None if plan in self.refused else plan

    def build(self) -> bytes:
        self.builds += 1
        return PLAN


def test_a_plan_is_built_once(store: PlanStore) -> None:
    library = Library()
    assert store.obtain(library.load, library.build) == PLAN
    assert store.obtain(library.load, library.build) == PLAN
    assert library.builds == 1


OTHERS = {
    "weights": replace(KEY, graph_sha256="b" * 64),
    "version": replace(KEY, engine="tensorrt 11.4.1.10 float32"),
    "library": replace(KEY, engine="tensorrt-rtx 1.7.1.116 float32"),
    "precision": replace(KEY, engine="tensorrt 11.4.0.106 bfloat16"),
    "gpu": replace(KEY, machine="NVIDIA H200 sm_90, driver 580.65.06"),
    "builder": replace(KEY, source="c" * 64),
    "driver": replace(KEY, machine="NVIDIA H100 80GB HBM3 sm_90, driver 590.10"),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())
def test_a_plan_of_another_key_is_not_run_wherever_it_lies(
    store: PlanStore, tmp_path: Path, other: EngineKey
) -> None:
    store.save("plan", PLAN)
    theirs = PlanStore(tmp_path, other, RUNGS)
    assert theirs.load("plan") is None
    theirs.file("plan").parent.mkdir(parents=True)
    shutil.copy(store.file("plan"), theirs.file("plan"))  # the file swapped in by hand
    library = Library()
    theirs.obtain(library.load, library.build)
    assert library.builds == 1


def test_a_plan_for_other_batch_sizes_is_not_run(store: PlanStore, tmp_path: Path) -> None:
    store.save("plan", PLAN)
    more = PlanStore(tmp_path, KEY, (*RUNGS, 8))
    shutil.copy(store.file("plan"), more.file("plan"))
    assert more.load("plan") is None


def test_one_kind_is_not_taken_for_another(store: PlanStore) -> None:
    store.save("kernels", PLAN)
    shutil.copy(store.file("kernels"), store.file("plan"))
    assert store.load("plan") is None


def damages() -> dict[str, bytes]:
    scratch = PlanStore(Path("/nonexistent"), KEY, RUNGS)
    whole = scratch._stamp("plan", PLAN).model_dump_json().encode() + b"\n" + PLAN
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    return {
        "empty": b"",
        "no stamp": PLAN,
        "cut in the stamp": whole[:40],
        "cut after the stamp": whole[: -len(PLAN)],
        "cut short": whole[:-1],
        "a bit flipped": bytes(flipped),
        "something appended": whole + b"\0",
        "a stamp that says more": whole.replace(b'{"kind"', b'{"more":1,"kind"', 1),
    }


@pytest.mark.parametrize("damaged", damages().values(), ids=damages().keys())
def test_a_damaged_plan_is_built_again_and_never_run(store: PlanStore, damaged: bytes) -> None:
    store.save("plan", PLAN)
    store.file("plan").write_bytes(damaged)
    library = Library()
    assert store.obtain(library.load, library.build) == PLAN
    assert (library.builds, library.loaded) == (1, [PLAN])
    assert store.load("plan") == PLAN


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_a_plan_that_others_may_write_is_built_again(store: PlanStore, mode: int) -> None:
    store.save("plan", PLAN)
    store.file("plan").chmod(mode)
    library = Library()
    store.obtain(library.load, library.build)
    assert library.builds == 1
    assert store.load("plan") == PLAN


@pytest.mark.parametrize(
    ("owner", "mode", "ours"),
    [(1000, 0o644, True), (0, 0o644, True), (1001, 0o644, False), (1000, 0o664, False), (0, 0o646, False)],
)
def test_ours_is_what_no_other_user_can_have_written(
    monkeypatch: pytest.MonkeyPatch, owner: int, mode: int, ours: bool
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert is_ours(os.stat_result((mode, 0, 0, 1, owner, 0, 0, 0, 0, 0))) is ours


def test_a_plan_the_library_does_not_take_is_built_again_once(store: PlanStore) -> None:
    store.save("plan", b"of a library that said it was the same")
    library = Library(b"of a library that said it was the same")
    assert store.obtain(library.load, library.build) == PLAN
    assert library.builds == 1
    hopeless = Library(PLAN)
    with pytest.raises(BackendError, match="does not load the plan it has just built for NVIDIA H100"):
        store.obtain(hopeless.load, hopeless.build)
    assert hopeless.builds == 1


BUILDER = """
import sys, time
from pathlib import Path
from engines.backends.plan_store import PlanStore
from engines.cache import EngineKey

store = PlanStore(Path(sys.argv[1]), EngineKey(*sys.argv[2:5], 0, source=sys.argv[5]), (1, 2, 4))

def build():
    plan = store.file("plan")
    plan.with_name(plan.name + ".1.partial").write_bytes(b"half a pl")
    print("building", flush=True)
    time.sleep(600)
    return b"never"

store.obtain(lambda plan: plan, build)
"""


def test_a_build_killed_midway_leaves_nothing_to_run(store: PlanStore, tmp_path: Path) -> None:
    words = [sys.executable, "-c", BUILDER, str(tmp_path), KEY.graph_sha256, KEY.engine, KEY.machine, KEY.source]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "building\n"
        assert store.load("plan") is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    library = Library()
    assert store.obtain(library.load, library.build) == PLAN  # the dead process holds no lock
    assert (library.builds, library.loaded) == (1, [PLAN])
    assert not list(store.file("plan").parent.glob("*.partial"))


@pytest.mark.parametrize("kind", ["plan", "kernels", "timings"])
def test_what_was_left_unfinished_goes_when_its_kind_is_made_again(store: PlanStore, kind: Kind) -> None:
    left = store.file(kind).with_name(f"{store.file(kind).name}.1.partial")
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half a pl")
    store.save(kind, PLAN)
    assert not left.exists()
    assert store.load(kind) == PLAN


def test_what_another_is_writing_is_left_alone(store: PlanStore) -> None:
    with store._making("kernels"):
        unfinished = store.file("kernels").with_name(f"{store.file('kernels').name}.2.partial")
        unfinished.write_bytes(b"half of th")
        store.save("plan", PLAN)
        other = threading.Thread(target=store.save, args=("kernels", PLAN))
        other.start()
        other.join(0.2)
        assert unfinished.exists()
    other.join()
    assert not unfinished.exists()


def test_two_who_want_a_plan_build_it_once(tmp_path: Path) -> None:
    library, building = Library(), threading.Event()

    def build() -> bytes:
        building.set()
        time.sleep(0.2)
        return library.build()

    def want() -> None:
        PlanStore(tmp_path, KEY, RUNGS).obtain(library.load, build)

    threads = [threading.Thread(target=want) for _ in range(2)]
    threads[0].start()
    assert building.wait(60)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert (library.builds, len(library.loaded)) == (1, 2)


def test_a_failed_build_lets_the_next_one_try(store: PlanStore) -> None:
    def fail() -> bytes:
        raise BackendError("out of memory")

    library = Library()
    with pytest.raises(BackendError, match="out of memory"):
        store.obtain(library.load, fail)
    assert store.obtain(library.load, library.build) == PLAN


def test_what_graphs_share_is_kept_apart_from_any_of_them(store: PlanStore, tmp_path: Path) -> None:
    store.of_every_graph().save("timings", b"conv 3x3: 0.1 ms")
    sibling = PlanStore(tmp_path, replace(KEY, graph_sha256="c" * 64), (8,))
    assert sibling.of_every_graph().load("timings") == b"conv 3x3: 0.1 ms"
    assert store.load("timings") is None
    newer = PlanStore(tmp_path, OTHERS["builder"], RUNGS)
    assert newer.of_every_graph().load("timings") == b"conv 3x3: 0.1 ms"
    elsewhere = PlanStore(tmp_path, OTHERS["gpu"], RUNGS)
    assert elsewhere.of_every_graph().load("timings") is None


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    store = PlanStore(tmp_path / "file", KEY, RUNGS)
    library = Library()
    with pytest.raises(BackendError, match=r"cannot keep an engine in .*file/.*; choose another cache"):
        store.obtain(library.load, library.build)
