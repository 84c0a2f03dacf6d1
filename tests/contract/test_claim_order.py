"""Who is claimed next: tenants by turns, then priority and age; returned jobs first, suspects alone."""

from __future__ import annotations

import pytest

from server.jobs import MAX_CRASHES, PRIORITY_S, JobStatus
from tests.contract.lab import LEASE_S, MODELS, RESULT, Lab, job, status

pytestmark = pytest.mark.anyio


async def claimed(lab: Lab, rows: int = 1, models: tuple[str, ...] = MODELS) -> list[str]:
    return [lease.job.id for lease in await lab.store.claim("w", models, rows)]


async def test_tenants_take_turns_by_predicted_seconds(lab: Lab) -> None:
    for k in range(4):
        await lab.store.submit(job(f"a{k}", tenant="a", cost_s=1.0))
    for k in range(2):
        await lab.store.submit(job(f"b{k}", tenant="b", cost_s=2.0))
    assert await claimed(lab, rows=6) == ["a0", "b0", "a1", "a2", "b1", "a3"]


async def test_a_tenant_that_was_away_has_no_credit(lab: Lab) -> None:
    await lab.store.submit(job("b0", tenant="b"))
    assert await claimed(lab) == ["b0"]
    for k in range(6):
        await lab.store.submit(job(f"a{k}", tenant="a"))
    for k in range(4):
        assert await claimed(lab) == [f"a{k}"]
    for k in range(1, 4):
        await lab.store.submit(job(f"b{k}", tenant="b"))
    assert sorted(await claimed(lab, rows=2)) == ["a4", "b1"]
    assert sorted(await claimed(lab, rows=2)) == ["a5", "b2"]


async def test_a_tenant_that_emptied_its_queue_has_still_been_served(lab: Lab) -> None:
    await lab.store.submit(job("a0", tenant="a", cost_s=10.0))
    for name in ("b0", "b1"):
        await lab.store.submit(job(name, tenant="b"))
    assert await claimed(lab) == ["a0"]
    await lab.store.submit(job("a1", tenant="a"))
    assert await claimed(lab, rows=3) == ["b0", "b1", "a1"]


async def test_jobs_predicted_to_cost_nothing_take_turns_too(lab: Lab) -> None:
    for tenant in "ab":
        for k in range(2):
            await lab.store.submit(job(f"{tenant}{k}", tenant=tenant, cost_s=0.0))
    assert await claimed(lab, rows=4) == ["a0", "b0", "a1", "b1"]


async def test_priority_goes_first_within_a_tenant_only(lab: Lab) -> None:
    await lab.store.submit(job("low", tenant="a"))
    await lab.store.submit(job("high", tenant="a", priority=9))
    await lab.store.submit(job("other", tenant="b"))
    assert await claimed(lab, rows=3) == ["high", "other", "low"]


async def test_no_priority_is_overtaken_for_ever(lab: Lab) -> None:
    await lab.store.submit(job("old"))
    await lab.pass_time(2 * PRIORITY_S + 1)
    await lab.store.submit(job("two levels up", priority=2))
    assert await claimed(lab, rows=2) == ["old", "two levels up"]


async def test_the_position_in_the_queue_is_told(lab: Lab) -> None:
    for k in range(3):
        await lab.store.submit(job(f"a{k}", tenant="a"))
    await lab.store.submit(job("b0", tenant="b"))
    positions = [state.queue_position for name in ("a0", "a1", "a2", "b0") if (state := await lab.store.get(name))]
    assert positions == [0, 2, 3, 0]
    await lab.store.claim("w", MODELS, 1)
    running = await lab.store.get("a0")
    assert running is not None
    assert running.queue_position is None


async def test_a_worker_gets_only_the_models_it_has(lab: Lab) -> None:
    await lab.store.submit(job("x", model="x"))
    await lab.store.submit(job("m"))
    await lab.store.submit(job("y", model="y", tenant="other"))
    assert await claimed(lab, rows=9) == ["m"]
    assert await claimed(lab, rows=9, models=("z",)) == []
    assert sorted(await claimed(lab, rows=9, models=("x", "y"))) == ["x", "y"]


async def test_a_worker_finds_its_model_behind_many_tenants_of_another(lab: Lab) -> None:
    for k in range(70):
        await lab.store.submit(job(f"x{k}", model="x", tenant=f"t{k}"))
    await lab.store.submit(job("m", tenant="u"))
    assert await claimed(lab) == ["m"]


async def test_a_job_that_lost_its_lease_runs_alone(lab: Lab) -> None:
    for name in "ab":
        await lab.store.submit(job(name))
    first = await lab.store.claim("dead", MODELS, 10)
    assert [lease.alone for lease in first] == [False, False]
    await lab.pass_time(LEASE_S + 1)
    await lab.store.reap()
    await lab.store.submit(job("c", priority=9))
    for name in "ab":
        (lease,) = await lab.store.claim("w", MODELS, 10)
        assert (lease.job.id, lease.alone) == (name, True)
    (lease,) = await lab.store.claim("w", MODELS, 10)
    assert (lease.job.id, lease.alone) == ("c", False)


async def test_a_job_given_back_unharmed_goes_first_and_in_company(lab: Lab) -> None:
    for name in "abc":
        await lab.store.submit(job(name))
    leases = await lab.store.claim("leaving", MODELS, 2)
    for lease in reversed(leases):
        assert await lab.store.give_back(lease)
        assert not await lab.store.give_back(lease)
        assert not await lab.store.finish(lease, RESULT)
    again = await lab.store.claim("w", MODELS, 10)
    assert sorted(lease.job.id for lease in again[:2]) == ["a", "b"]
    assert [(lease.attempt, lease.alone) for lease in again] == [(2, False), (2, False), (1, False)]


async def test_poison_fails_after_taking_the_engine_down_while_alone(lab: Lab) -> None:
    await lab.store.submit(job("bad"))
    await lab.store.submit(job("companion"))
    for lease in await lab.store.claim("w", MODELS, 10):
        assert await lab.store.give_back(lease, crashed=True)
    seen = set()
    for _ in range(MAX_CRASHES + 1):
        (lease,) = await lab.store.claim("w", MODELS, 10)
        assert lease.alone
        seen.add(lease.job.id)
        if lease.job.id == "bad":
            assert await lab.store.give_back(lease, crashed=True)
        else:
            assert await lab.store.finish(lease, RESULT)
    assert seen == {"bad", "companion"}
    assert await status(lab, "companion") is JobStatus.SUCCEEDED
    state = await lab.store.wait("bad")
    assert state.failure is not None
    assert state.failure.code == "poison"
    assert await lab.store.claim("w", MODELS, 10) == []


async def test_jobs_of_silent_leases_keep_their_order_whoever_they_are_of(lab: Lab) -> None:
    names = [f"j{k}" for k in range(4)]
    for k, name in enumerate(names):
        await lab.store.submit(job(name, tenant="ab"[k % 2]))
        await lab.pass_time(1)
    assert len(await lab.store.claim("dead", MODELS, 10)) == 4
    await lab.pass_time(LEASE_S + 1)
    assert await lab.store.reap() == 4
    assert [name for _ in names for name in await claimed(lab)] == names


async def test_the_oldest_that_was_given_back_goes_first_whatever_its_model(lab: Lab) -> None:
    await lab.store.submit(job("old", model="y"))
    await lab.pass_time(1)
    await lab.store.submit(job("young", model="x"))
    for lease in await lab.store.claim("leaving", ("x", "y"), 10):
        await lab.store.give_back(lease)
    assert await claimed(lab, models=("x", "y")) == ["old"]
