"""The toy bundle is what it claims: it verifies, and every request field changes the image."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from engines.bundle import verify_bundle, write_bundle
from engines.errors import BundleError
from engines.open import open_pipeline
from engines.pipeline import Pipeline
from tests.support.toy_bundle import ToyOptions, make_toy_bundle


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    bundle = make_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle", ToyOptions(stochastic=(4,)))
    return open_pipeline(bundle.path, "onnxruntime", rungs=(1, 2))


def test_images_differ_by_prompt_guidance_seed_steps_and_sampler(pipeline: Pipeline) -> None:
    base = pipeline.generate(["zero"], 2.0, [1], 4)
    others = (
        pipeline.generate(["one"], 2.0, [1], 4),
        pipeline.generate(["zero"], 3.0, [1], 4),
        pipeline.generate(["zero"], 2.0, [2], 4),
        pipeline.generate(["zero"], 2.0, [1], 8),
        pipeline.generate(["zero"], 2.0, [1], 4, "stochastic"),
    )
    assert base.shape == (1, 64, 64, 3)
    assert all((base != other).any() for other in others)
    assert (base == pipeline.generate(["zero"], 2.0, [1], 4)).all()


def test_every_file_is_on_disk_before_the_bundle_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, placed, fsync, rename = set[int](), list[Path](), os.fsync, Path.rename

    def noted(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def place(folder: Path, target: Path) -> Path:
        assert {path.stat().st_ino for path in (folder, *folder.rglob("*"))} <= synced
        placed.append(target)
        return rename(folder, target)

    monkeypatch.setattr("os.fsync", noted)
    monkeypatch.setattr(Path, "rename", place)
    bundle = make_toy_bundle(tmp_path / "bundle")
    assert placed == [bundle.path]


def test_a_bundle_that_is_not_whole_takes_no_place(tmp_path: Path) -> None:
    old = make_toy_bundle(tmp_path / "bundle")
    staging = Path(shutil.copytree(old.path, tmp_path / "staging"))
    (staging / "decode.onnx").write_bytes(b"half a gra")
    with pytest.raises(BundleError, match=r"decode\.onnx has 10 bytes"):
        write_bundle(staging, old.path, old.manifest)
    assert verify_bundle(old.path) == old


def test_one_class_can_be_poisoned_without_touching_its_companions(tmp_path: Path) -> None:
    bundle = make_toy_bundle(tmp_path / "bundle", ToyOptions(nan_class=3))
    pipeline = open_pipeline(bundle.path, "onnxruntime", rungs=(1, 2))
    student = pipeline.student(4)
    rows = [pipeline.start(c, 2.0, 1, student) for c in pipeline.condition(["three", "four"])]
    pipeline.step(rows)
    assert np.isnan(rows[0].latent).all()
    assert np.isfinite(rows[1].latent).all()


def test_a_shared_student_serves_every_step_count_from_one_graph(tmp_path: Path) -> None:
    bundle = make_toy_bundle(tmp_path / "bundle", ToyOptions(shared=True))
    assert verify_bundle(bundle.path).manifest.graphs.keys() == {"condition", "decode", "encode", "step"}
    pipeline = open_pipeline(bundle.path, "onnxruntime", rungs=(2,))
    one, four = (pipeline.start(pipeline.condition(["six"])[0], 2.0, 5, pipeline.student(n)) for n in (1, 4))
    assert one.batch_key == four.batch_key
    pipeline.step([one, four])
    assert (one.done, four.steps_left) == (True, 3)
