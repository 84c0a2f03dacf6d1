"""A new version of a bundle under way: taken up beside the old, or refused; no row is dropped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from engines.errors import BackendError, BundleError
from tests.support.spawned import SpawnedThread
from tests.support.stage import BUILT, FIRST, LATER, code_of, engine_of, stage
from tests.support.toy_bundle import ToyOptions, make_toy_bundle
from tests.support.workers import until

pytestmark = pytest.mark.anyio


def replace(bundle: Path, **options: Any) -> None:
    shutil.rmtree(bundle)
    make_toy_bundle(bundle, ToyOptions(**options))


async def test_a_new_version_is_taken_up_beside_the_old(tmp_path: Path) -> None:
    bundle = make_toy_bundle(tmp_path / "toy").path
    async with stage(bundle, start=False) as on:
        on.built.set()
        old = on.succession.versions[0].bundle.sha256
        on.first.bench.hold()
        await on.submit("a", steps=8)
        await until(lambda: bool(on.first.bench.batches))
        replace(bundle, weights_seed=1)
        on.makes.append(SpawnedThread(bundle, LATER))
        (version,) = await on.succession.renew()
        assert engine_of(await on.make("b")) == LATER
        on.first.bench.allow()
        assert engine_of(await on.ended("a")) == FIRST
        assert version.bundle.sha256 == on.loaded[0]["toy-digits"] != old
        assert on.value("halfstep_bundle_info", model="toy-digits", sha256=version.bundle.sha256) == 1
        assert not on.value("halfstep_bundle_info", model="toy-digits", sha256=old)
        assert on.value("halfstep_denoise_steps_total", model="toy-digits") == 8 + 4, "no probes of the new one"


async def test_a_new_version_needs_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HALFSTEP_CACHE_DIR", str(tmp_path / "file" / "cache"))
    bundle = make_toy_bundle(tmp_path / "toy").path
    async with stage(bundle, start=False) as on:
        on.build_error = "Nothing can be built without a cache"
        on.built.set()
        replace(bundle, weights_seed=1)
        on.makes.append(SpawnedThread(bundle, LATER))
        await on.succession.renew()
        assert on.changes("bundle", "taken_up") == 1
        assert engine_of(await on.make("a")) == LATER


async def test_jobs_that_wait_for_an_engine_that_is_down_go_to_the_new_version(tmp_path: Path) -> None:
    bundle = make_toy_bundle(tmp_path / "toy").path
    async with stage(bundle, start=False) as on:
        on.built.set()
        on.first.bench.hold()
        await on.submit("a", steps=8)
        await until(lambda: bool(on.first.bench.batches))
        on.first.away = True
        replace(bundle, weights_seed=1)
        on.makes.append(SpawnedThread(bundle, LATER))
        await on.succession.renew()
        assert engine_of(await on.ended("a")) == LATER


async def test_a_new_version_begins_at_the_first_engine_and_is_built_again(
    toy_bundle: Path, tmp_path: Path
) -> None:
    bundle = make_toy_bundle(tmp_path / "toy").path
    async with stage(bundle, SpawnedThread(bundle, BUILT)) as on:
        on.built.set()
        await on.until_change("engine", "taken_up")
        on.built.clear()
        replace(bundle, weights_seed=1)
        on.makes += [SpawnedThread(bundle, FIRST), SpawnedThread(bundle, LATER)]
        on.built.set()
        await on.succession.renew()
        await until(lambda: on.changes("engine", "taken_up") == 2)
        assert engine_of(await on.make("a")) == LATER


@pytest.mark.parametrize("fault", ["altered", "gone", "fewer steps", "another name", "nan"])
async def test_a_bad_new_version_is_refused_and_the_old_goes_on(tmp_path: Path, fault: str) -> None:
    bundle = make_toy_bundle(tmp_path / "toy").path
    async with stage(bundle, start=False) as on:
        on.built.set()
        options: dict[str, dict[str, Any]] = {
            "fewer steps": {"steps": (1, 4)},
            "another name": {"name": "toy-other"},
        }
        replace(bundle, **{"weights_seed": 1, **options.get(fault, {})})
        if fault == "altered":
            (bundle / "decode.onnx").write_bytes(b"x" + (bundle / "decode.onnx").read_bytes()[1:])
        if fault == "gone":
            shutil.rmtree(bundle)
        if fault == "nan":
            on.makes.append(SpawnedThread(bundle, LATER))
            on.makes[0].bench.factor = float("nan")
        with pytest.raises((BundleError, BackendError)):
            await on.succession.renew()
        assert engine_of(await on.make("a", steps=8)) == FIRST


async def test_a_doubt_is_cleared_though_a_new_version_came_in_between_and_was_refused(tmp_path: Path) -> None:
    bundle = make_toy_bundle(tmp_path / "toy").path
    built = SpawnedThread(bundle, BUILT)
    async with stage(bundle, built) as on:
        on.built.set()
        await on.until_change("engine", "taken_up")
        built.bench.poison = 9  # no sample is of the last class
        built.bench.hold()
        await on.submit("bad", "nine")
        built.bench.allow(1)
        await until(lambda: not on.succession.up)
        replace(bundle, weights_seed=1)
        on.makes.append(SpawnedThread(bundle, LATER, refusal=BackendError("no such device")))
        with pytest.raises(BackendError, match="no such device"):
            await on.succession.renew()
        built.bench.allow()
        assert code_of(await on.ended("bad")) == "engine_error"
        assert engine_of(await on.make("good")) == BUILT


async def test_what_is_unchanged_is_left_alone_and_what_was_refused_is_tried_again(toy_bundle: Path) -> None:
    async with stage(toy_bundle) as on:
        on.build_error = "no room"
        on.built.set()
        await on.until_change("engine", "refused")
        on.build_error = ""
        on.makes.append(SpawnedThread(toy_bundle, BUILT))
        await on.succession.renew()
        await on.until_change("engine", "taken_up")
        assert engine_of(await on.make("a")) == BUILT
