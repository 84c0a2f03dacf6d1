"""Which versions may follow one that is served, how far two engines may differ, and what SIGHUP does."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.bundle import verify_bundle
from engines.condition import LabelClass, LabelTokenizer, LabelVocabulary, load_tokenizer
from engines.errors import BundleError
from engines.pipeline import find_student
from engines.rows import find_encoder
from server.metrics import Metrics
from server.parity import Sample, UnlikeError, check_like, probe_requests
from server.renewal import Renewals, heed_early
from server.settings import Settings
from server.succession import start_settings
from server.versions import Version, hashes, new_versions, offer
from tests.support.offline import offline_service
from tests.support.toy_bundle import ToyOptions, make_toy_bundle


def version(path: Path, **options: Any) -> Version:
    return Version.of(make_toy_bundle(path, ToyOptions(**options)))


def test_a_version_that_offers_all_of_the_old_and_more_follows_it(tmp_path: Path) -> None:
    old = version(tmp_path / "old", steps=(1, 4))
    new = version(tmp_path / "new", stochastic=(4,), encoders=(4,), weights_seed=1)
    assert hashes(new_versions(Settings(bundles=(tmp_path / "new",)), [old])) == hashes([new]) != hashes([old])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ({"name": "toy-other"}, {}, "no model toy-other"),
        ({"steps": (1, 3, 4)}, {}, "deterministic sampler with 3 steps"),
        ({"stochastic": (4,)}, {}, "stochastic sampler with 4 steps"),
        ({"encoders": (4,)}, {}, "encoder of 4 steps"),
    ],
)
def test_a_version_that_lacks_something_is_refused(
    tmp_path: Path, old: dict[str, Any], new: dict[str, Any], said: str
) -> None:
    served = version(tmp_path / "old", **old)
    make_toy_bundle(tmp_path / "new", ToyOptions(**new))
    with pytest.raises(BundleError, match=said):
        new_versions(Settings(bundles=(tmp_path / "new",)), [served])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tasks": ("text_to_image",)}, "the task edit"),
        ({"guidance": {"min": 1.0, "max": 4.0, "default": 2.0}}, "guidance_scale 1 to 5"),
    ],
)
def test_a_version_with_a_narrower_manifest_is_refused(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str
) -> None:
    old = Version.of(verify_bundle(toy_bundle))
    manifest = type(old.bundle.manifest).model_validate({**old.bundle.manifest.model_dump(), **change})
    narrow = Version(type(old.bundle)(toy_bundle, manifest, {}, "0" * 64), old.tokenizer)
    monkeypatch.setattr("server.versions.read_versions", lambda _: (narrow,))
    with pytest.raises(BundleError, match=said):
        new_versions(Settings(), [old])


def test_an_api_offers_the_new_version(tmp_path: Path) -> None:
    service = offline_service(make_toy_bundle(tmp_path / "old").path)
    new = version(tmp_path / "new", stochastic=(4,), weights_seed=1)
    offer([new], service)
    assert service.catalogue.default.manifest is new.bundle.manifest
    labels = {"model": "toy-digits", "sha256": new.bundle.sha256}
    assert service.metrics.registry.get_sample_value("halfstep_bundle_info", labels) == 1


def test_what_is_built_beside_needs_a_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="start_backend needs a cache_dir"):
        Settings(start_backend="onnxruntime", cache_dir=None)
    assert Settings(start_backend="onnxruntime", cache_dir=tmp_path).start_backend == "onnxruntime"


@pytest.mark.parametrize(("start", "precision"), [("openvino", "auto"), ("torch-cuda", "float16")])
def test_the_first_engine_has_the_precision_where_it_offers_it(start: str, precision: str, tmp_path: Path) -> None:
    wanted = {"backend": "tensorrt", "precision": "float16", "start_backend": start, "cache_dir": tmp_path}
    assert start_settings(Settings.model_validate(wanted), []).precision == precision


def test_a_link_is_followed_once(tmp_path: Path) -> None:
    make_toy_bundle(tmp_path / "one")
    (tmp_path / "current").symlink_to(tmp_path / "one")
    (served,) = new_versions(Settings(bundles=(tmp_path / "current",)), [])
    assert served.bundle.path == (tmp_path / "one").resolve()


def test_labels_read_all_of_what_they_know() -> None:
    def labels(*names: str) -> LabelTokenizer:
        return LabelTokenizer(LabelVocabulary(classes=tuple(LabelClass(name=name) for name in names)))

    assert labels("one", "two").reads_all_of(labels("one"))
    assert not labels("one").reads_all_of(labels("one", "two"))


def test_probes_visit_every_student_task_and_encoder(tmp_path: Path) -> None:
    bundle = make_toy_bundle(tmp_path / "toy", ToyOptions(stochastic=(4,), encoders=(2, 4)))
    probes = probe_requests(bundle.manifest, load_tokenizer(bundle).known())
    students = {(s.steps, s.sampler) for s in bundle.manifest.students}
    assert {(p.steps, p.sampler) for p in probes if p.task == "text_to_image"} == students
    assert {p.task for p in probes} == set(bundle.manifest.tasks)
    assert {p.encoder_steps for p in probes if p.mode == "invert"} == {2, 4}
    assert all(p.n == 1 for p in probes)


def test_encoders_are_probed_with_a_student_that_keeps_the_noise(toy_bundle: Path) -> None:
    """Where the default one draws fresh noise, as a consistency finish does."""
    manifest = verify_bundle(toy_bundle).manifest
    steps = manifest.default_steps
    fresh, kept = (
        tuple(s.model_copy(update={"sampler": sampler}) if s.steps == steps else s for s in manifest.students)
        for sampler in ("consistency", "deterministic")
    )
    encoder = kept[0].model_copy(update={"graph": "invert"})
    for students in (fresh, kept):
        mixed = manifest.model_copy(update={"students": students, "encoders": (encoder,)})
        [probe] = [p for p in probe_requests(mixed, ["one"]) if p.mode == "invert"]
        assert find_encoder(mixed, find_student(mixed, probe.steps, probe.sampler), probe.encoder_steps) == encoder
    alone = tuple(s for s in fresh if s.steps == steps)
    mixed = manifest.model_copy(update={"students": alone, "encoders": (encoder,)})
    assert not [p for p in probe_requests(mixed, ["one"]) if p.mode == "invert"]


CORNER, EVERYWHERE = np.s_[0, 0], np.s_[:, :]


@pytest.mark.parametrize(
    ("where", "levels", "precision", "like"),
    [
        (CORNER, 2, "float32", True),
        (CORNER, 3, "float32", False),
        (EVERYWHERE, 1, "float32", False),
        (CORNER, 90, "bfloat16", True),
        (EVERYWHERE, 9, "bfloat16", False),
    ],
)
def test_how_far_images_may_lie_apart(
    toy_bundle: Path, where: Any, levels: int, precision: str, like: bool
) -> None:
    request = probe_requests(verify_bundle(toy_bundle).manifest, ["one"])[0]
    expected = np.full((64, 64, 3), 100, np.uint8)
    made = expected.copy()
    made[where] += np.uint8(levels)
    if like:
        check_like(Sample(request, expected), made, precision)
    else:
        with pytest.raises(UnlikeError, match="levels"):
            check_like(Sample(request, expected), made, precision)


@pytest.mark.anyio
async def test_each_hangup_renews_and_what_is_refused_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.renewal.os.isatty", lambda _: False)
    metrics, asked = Metrics(), asyncio.Semaphore(0)

    async def renew() -> None:
        asked.release()
        raise BundleError("not this one")

    renewals = Renewals(renew, metrics)
    renewals.start()
    for count in (1, 2):
        os.kill(os.getpid(), signal.SIGHUP)
        async with asyncio.timeout(60):
            await asked.acquire()
        labels = {"what": "bundle", "outcome": "refused"}
        assert metrics.registry.get_sample_value("halfstep_takeovers_total", labels) == count
    await renewals.close()
    asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)


@pytest.mark.anyio
async def test_a_hangup_while_bundles_are_loaded_renews_once_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.renewal.os.isatty", lambda _: False)
    asked = asyncio.Event()

    async def renew() -> None:
        asked.set()

    former = signal.getsignal(signal.SIGHUP)
    heed_early()
    os.kill(os.getpid(), signal.SIGHUP)
    renewals = Renewals(renew, Metrics())
    renewals.start()
    async with asyncio.timeout(60):
        await asked.wait()
    await renewals.close()
    asyncio.get_running_loop().remove_signal_handler(signal.SIGHUP)
    signal.signal(signal.SIGHUP, former)
