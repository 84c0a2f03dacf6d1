"""Changing engines under way: built beside, checked, taken up, given up; no row is dropped."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from engines.errors import BackendError
from tests.support.spawned import SpawnedThread
from tests.support.stage import BUILT, FIRST, LATER, code_of, engine_of, stage
from tests.support.workers import until

pytestmark = pytest.mark.anyio


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
