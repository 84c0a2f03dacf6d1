"""Changing engines under way: built beside, checked, taken up, given up, renewed; no row is dropped."""

from __future__ import annotations

import asyncio
import errno
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from engines.bundle import verify_bundle
from engines.errors import BackendError, BundleError
from server.costs import Offer
from server.engine import Report
from server.engine_switch import EngineSwitch
from server.jobs import Job, JobFailure, JobState, Lease
from server.metrics import Metrics
from server.request import DenoiseRequest
from server.settings import Settings
from server.stores.memory import MemoryStore
from server.succession import Succession
from server.versions import Version
from server.work import Died, Event, Failed, Made
from server.worker import Worker
from tests.support.spawned import SpawnedThread
from tests.support.toy_bundle import ToyOptions, make_toy_bundle

pytestmark = pytest.mark.anyio

FIRST, BUILT, LATER = "first 1 float32", "built 1 float32", "later 1 float32"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - what is waited for happens on other threads
            await asyncio.sleep(0.002)


@dataclass
class Stage:
    """A worker whose next engines a test prepares. built: lets the build end; makes: the next engines, in order."""

    succession: Succession
    first: SpawnedThread
    store: MemoryStore
    metrics: Metrics
    makes: list[SpawnedThread]
    built: asyncio.Event = field(default_factory=asyncio.Event)
    build_error: str = ""
    loaded: list[Mapping[str, str]] = field(default_factory=list)

    async def make(self, name: str, digit: str = "one", **fields: Any) -> JobState:
        await self.submit(name, digit, **fields)
        return await self.ended(name)

    async def submit(self, name: str, digit: str = "one", **fields: Any) -> None:
        chosen = {"n": 1, "steps": 4, "seed": 1, **fields}
        request = DenoiseRequest(
            model="toy-digits", prompt=digit, guidance_scale=2.0, width=64, height=64, **chosen
        )
        await self.store.submit(Job(id=name, request=request, cost_s=0.0))

    async def ended(self, name: str) -> JobState:
        async with asyncio.timeout(60):
            return await self.store.wait(name)

    def changes(self, what: str, outcome: str) -> float:
        return self.value("halfstep_takeovers_total", what=what, outcome=outcome)

    def value(self, metric: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(metric, labels) or 0.0

    async def until_change(self, what: str, outcome: str) -> None:
        await until(lambda: self.changes(what, outcome) > 0)

    async def at_work(self, built: SpawnedThread) -> None:
        """Take up the built engine, and hold it in the steps of the jobs a, b and c."""
        self.built.set()
        await self.until_change("engine", "taken_up")
        built.bench.hold()
        for name in "abc":
            await self.submit(name, "one", steps=8)
        await until(lambda: built.bench.batches[-1][0] == "step_8")


@asynccontextmanager
async def stage(
    bundle: Path, *makes: SpawnedThread, start: bool = True, lease_s: float = 30.0
) -> AsyncIterator[Stage]:
    """A worker on its first engine, with those to come. start: the first one is not the preferred."""
    backends: dict[str, Any] = {"backend": "openvino", "start_backend": "onnxruntime"} if start else {}
    settings = Settings(bundles=(bundle,), **backends)

    def make(_: Settings, versions: Mapping[str, str]) -> SpawnedThread:
        made.loaded.append(versions)
        return made.makes.pop(0)

    async def build(_: Settings) -> None:
        await made.built.wait()
        if made.build_error:
            raise BackendError(made.build_error)

    first, metrics, store = SpawnedThread(bundle, FIRST), Metrics(), MemoryStore(lease_s)
    version = Version.of(verify_bundle(bundle))
    succession = Succession(first, settings, [version], metrics, make, build)
    made = Stage(succession, first, store, metrics, list(makes))
    task = asyncio.create_task(Worker("w", succession, store, metrics, lease_s=lease_s).run())
    yield made
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert first.closed


def engine_of(state: JobState) -> str:
    assert state.result is not None, state.failure
    return state.result.engine


def code_of(state: JobState) -> str:
    assert state.failure is not None
    return state.failure.code


async def test_new_rows_go_to_the_built_engine_and_started_ones_finish_where_they_are(toy_bundle: Path) -> None:
    built = SpawnedThread(toy_bundle, BUILT)
    async with stage(toy_bundle, built) as on:
        assert engine_of(await on.make("a")) == FIRST
        assert on.value("halfstep_engine_preferred", model="toy-digits") == 0
        built.bench.hold()
        on.built.set()
        await until(lambda: bool(built.bench.batches))
        on.first.bench.hold()  # the samples are made
        await on.submit("b", n=3, steps=8)
        await until(lambda: on.first.bench.batches[-1] == ("step_8", [1, 1, 1, 1]))
        built.bench.allow()
        await on.until_change("engine", "taken_up")
        after = await on.make("c")
        assert not on.first.closed
        on.first.bench.allow()
        assert [engine_of(state) for state in (await on.ended("b"), after)] == [FIRST, BUILT]
        await until(lambda: on.first.closed)
        assert [sample.request.steps for sample in on.succession.recent] == [4], "of c: the others are the former's"
        assert on.value("halfstep_engine_info", model="toy-digits", engine=BUILT) == 1
        assert not on.value("halfstep_engine_info", model="toy-digits", engine=FIRST)
        assert on.value("halfstep_engine_preferred", model="toy-digits") == 1


async def test_a_build_that_fails_leaves_the_first_engine(toy_bundle: Path) -> None:
    async with stage(toy_bundle) as on:
        on.build_error = "The build was ended by signal 9."
        on.built.set()
        await on.until_change("engine", "refused")
        assert engine_of(await on.make("a")) == FIRST


@pytest.mark.parametrize("fault", ["unlike", "nan", "raises", "refused"])
async def test_a_wrong_engine_is_never_taken_up(toy_bundle: Path, fault: str) -> None:
    built = SpawnedThread(toy_bundle, BUILT, refusal=BackendError("no such device") if fault == "refused" else None)
    built.bench.factor = {"unlike": 0.48, "nan": float("nan")}.get(fault, 0.5)
    built.bench.poison = 1 if fault == "raises" else None
    async with stage(toy_bundle, built) as on:
        on.built.set()
        await on.until_change("engine", "refused")
        assert engine_of(await on.make("a", "one")) == FIRST
        await until(lambda: built.closed)
        assert not on.changes("engine", "taken_up")


async def test_an_engine_that_fails_on_what_was_made_last_is_not_taken_up(toy_bundle: Path) -> None:
    built = SpawnedThread(toy_bundle, BUILT)
    built.bench.poison = 9  # no probe is of the last class
    async with stage(toy_bundle, built) as on:
        await on.make("a", "nine")
        on.built.set()
        await on.until_change("engine", "refused")
        assert not on.changes("engine", "taken_up")


@pytest.mark.parametrize("fault", ["nan", "raises", "dies", "stays away"])
async def test_an_engine_that_breaks_is_given_up_and_its_rows_are_made_by_the_first(
    toy_bundle: Path, fault: str
) -> None:
    built, again = SpawnedThread(toy_bundle, BUILT), SpawnedThread(toy_bundle, LATER)
    async with stage(toy_bundle, built, again) as on:
        await on.at_work(built)
        built.bench.factor = float("nan") if fault in ("nan", "dies") else 0.5
        built.bench.poison = 1 if fault == "raises" else None
        if fault == "dies":
            built.die()
        if fault == "stays away":
            built.away = True
            built.die()
            while not on.changes("engine", "given_up"):  # each try to start it fails
                await asyncio.sleep(0.01)
                built.die("no such device")
        built.bench.allow()
        assert {engine_of(await on.ended(name)) for name in "abc"} == {LATER}
        assert on.changes("engine", "given_up") == 1
        assert on.value("halfstep_engine_preferred", model="toy-digits") == 0
        assert built.closed


@pytest.mark.parametrize("refusal", [BackendError("no such device"), OSError(errno.EMFILE, "Too many open files")])
async def test_jobs_are_others_while_there_is_no_engine_to_go_back_to(
    toy_bundle: Path, refusal: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.succession.RETRY_S", 0.05)
    built = SpawnedThread(toy_bundle, BUILT)
    async with stage(toy_bundle, built, SpawnedThread(toy_bundle, LATER, refusal=refusal), lease_s=2.0) as on:
        await on.at_work(built)
        built.bench.factor = float("nan")
        built.bench.allow()
        found: set[str] = set()
        async with asyncio.timeout(60):
            while len(found) < 3:
                leases = await on.store.claim("other", ("toy-digits",), 10, wait_s=60)
                found |= {lease.job.id for lease in leases}
        assert found == {"a", "b", "c"}
        on.makes.append(SpawnedThread(toy_bundle, LATER))
        await on.until_change("engine", "given_up")
        assert engine_of(await on.make("d")) == LATER


async def test_a_job_that_fails_by_itself_does_not_cost_the_engine(toy_bundle: Path) -> None:
    built = SpawnedThread(toy_bundle, BUILT)
    async with stage(toy_bundle, built) as on:
        on.built.set()
        await on.until_change("engine", "taken_up")
        built.bench.poison = 9  # no sample is of the last class
        with capture_logs() as logs:
            for name in ("bad", "as bad"):
                assert code_of(await on.make(name, "nine")) == "engine_error"
        doubts = [line for line in logs if line["event"] == "engine_doubted"]
        assert len(doubts) == 1, "it is trusted for a while"
        assert engine_of(await on.make("good")) == BUILT
        assert not on.changes("engine", "given_up")


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


class Silent:
    """An engine that does nothing by itself, and remembers what it was asked for."""

    offers: Mapping[str, Offer] = {}
    up, pid = True, 0

    def __init__(self) -> None:
        self.joined: list[str] = []
        self.stopped: list[str] = []
        self.closed = False

    def start(self, report: Report) -> None:
        self.say = report

    async def ready(self) -> None:
        pass

    def join_job(self, lease: Lease) -> None:
        self.joined.append(lease.token)

    def stop_job(self, token: str) -> None:
        self.stopped.append(token)

    async def close(self) -> bool:
        self.closed = True
        return True


REQUEST = DenoiseRequest(model="m", prompt="p", seed=1, guidance_scale=2.0, steps=4, width=64, height=64)


@pytest.mark.parametrize("lost", [[], ["a/1"]], ids=["none", "one"])
async def test_what_a_former_engine_lost_is_reported_and_what_it_had_not_begun_goes_to_its_successor(
    lost: list[str],
) -> None:
    former, successor, told = Silent(), Silent(), list[Event]()
    switch = EngineSwitch(former)
    switch.start(told.extend)
    for name in "ab":
        switch.join_job(Lease(job=Job(id=name, request=REQUEST, cost_s=0.0), worker="w", attempt=1, queued_ms=0.0))
    switch.listen_to(successor)
    switch.take_up(successor, None)
    former.say([Died(frozenset(lost), "it ended", frozenset({"a/1", "b/1"} - set(lost)))])
    await until(lambda: former.closed)
    assert told == [Died(frozenset(lost), "it ended")]
    assert lost + successor.joined == ["a/1", "b/1"]


async def test_an_engine_that_fails_on_a_question_is_to_make_none_of_it() -> None:
    engine = Silent()
    switch = EngineSwitch(engine)
    switch.start(lambda _: None)
    asking = asyncio.create_task(switch.ask(engine, [REQUEST] * 3))
    await until(lambda: len(engine.joined) == 3)
    engine.say([Made(engine.joined[0], (np.zeros((1, 1, 3), np.uint8),), 0.0, 0.0, 0.0, 0.0)])
    engine.say([Failed(engine.joined[1], JobFailure(code="non_finite", message="m"), "steps")])
    with pytest.raises(BackendError, match="non_finite"):
        await asking
    assert set(engine.stopped) == set(engine.joined[1:])
