"""Any sequence of calls on any store agrees with a few lines of model: no job is lost, ended twice or stolen."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from server.jobs import (
    MAX_ATTEMPTS,
    MAX_CRASHES,
    IdempotencyConflictError,
    IdempotencyKey,
    JobStatus,
    Lease,
    Report,
)
from tests.contract.job_store_labs import LABS
from tests.contract.lab import FAILURE, LEASE_S, RESULT, Lab, job

ValueT = TypeVar("ValueT")

Q, R = JobStatus.QUEUED, JobStatus.RUNNING


class Known:
    """A job as the model sees it."""

    def __init__(self, n: int, model: str, tenant: str, deadline_s: float | None) -> None:
        self.n, self.model, self.tenant, self.deadline_s = n, model, tenant, deadline_s
        self.status = Q
        self.attempt = self.lost = self.crashes = 0
        self.beat_s = 0.0

    @property
    def alone(self) -> bool:
        return self.lost + self.crashes > 0


class StoreMachine(RuleBasedStateMachine):
    """lab_name: set by each subclass. Times keep two seconds from every limit, for a real server's clock runs."""

    lab_name = ""
    leases = Bundle("leases")
    jobs = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.new_event_loop()
        self._context: AbstractAsyncContextManager[Lab] = LABS[self.lab_name](result_ttl_s=1e6)
        self.lab = self.do(self._context.__aenter__())
        self.known: dict[str, Known] = {}
        self.keys: dict[tuple[str, str], tuple[str, str]] = {}
        self.now_s = 0.0

    def do(self, call: Awaitable[ValueT]) -> ValueT:
        async def run() -> ValueT:
            return await call

        return self._loop.run_until_complete(run())

    def teardown(self) -> None:
        self.do(self._context.__aexit__(None, None, None))
        self._loop.close()

    def holds(self, lease: Lease) -> Known | None:
        known = self.known[lease.job.id]
        return known if (known.status, known.attempt) == (R, lease.attempt) else None

    def requeue(self, known: Known) -> None:
        spent = known.lost >= MAX_ATTEMPTS or known.crashes >= MAX_CRASHES
        known.status = JobStatus.FAILED if spent else Q

    # ---- rules

    @rule(
        target=jobs,
        n=st.integers(1, 3),
        model=st.sampled_from("xy"),
        tenant=st.sampled_from("ab"),
        priority=st.integers(0, 2),
        deadline_s=st.sampled_from([None, 6, 50]),
        key=st.sampled_from(["", "k1", "k2"]),
        body=st.sampled_from("fg"),
    )
    def submit(
        self, n: int, model: str, tenant: str, priority: int, deadline_s: int | None, key: str, body: str
    ) -> Any:
        name = f"j{len(self.known)}"
        fields: dict[str, Any] = {"tenant": tenant, "priority": priority}
        made = job(name, n, model=model, deadline_ms=deadline_s and deadline_s * 1000, **fields)
        idempotency = IdempotencyKey(tenant=tenant, key=key, fingerprint=body) if key else None
        earlier = self.keys.get((tenant, key))
        found = self.do(self.lab.store.find_key(tenant, key))
        assert (found and (found[0].fingerprint, found[1])) == earlier
        if earlier is not None and earlier[0] != body:
            with pytest.raises(IdempotencyConflictError):
                self.do(self.lab.store.submit(made, idempotency))
            return multiple()
        submission = self.do(self.lab.store.submit(made, idempotency))
        assert (submission.job_id, submission.replayed) == ((earlier or ("", name))[1], earlier is not None)
        if earlier is not None:
            return multiple()
        if key:
            self.keys[tenant, key] = (body, name)
        self.known[name] = Known(n, model, tenant, None if deadline_s is None else self.now_s + deadline_s)
        return name

    @rule(
        target=leases,
        worker=st.sampled_from("uv"),
        models=st.sampled_from(["x", "y", "xy"]),
        rows=st.integers(1, 5),
    )
    def claim(self, worker: str, models: str, rows: int) -> Any:
        taken = self.do(self.lab.store.claim(worker, list(models), rows))
        for name in self.known:  # a claim ends what it finds too late; the model learns of it here
            self.learn_expiry(name)
        assert sum(lease.job.request.n for lease in taken) <= rows
        for lease in taken:
            known = self.known[lease.job.id]
            assert known.status is Q
            assert known.model in models
            assert known.deadline_s is None or known.deadline_s > self.now_s - 1
            assert lease.alone == known.alone
            assert not (lease.alone and len(taken) > 1)
            known.status, known.attempt, known.beat_s = R, known.attempt + 1, self.now_s
            assert lease.attempt == known.attempt
        return multiple(*taken)

    @rule(lease=leases)
    def heartbeat(self, lease: Lease) -> None:
        stop = self.do(self.lab.store.heartbeat([lease]))
        known = self.holds(lease)
        assert stop == (frozenset() if known else {lease.token})
        if known:
            known.beat_s = self.now_s

    @rule(lease=leases, step=st.integers(0, 4))
    def progress(self, lease: Lease, step: int) -> None:
        stop = self.do(self.lab.store.progress([Report(lease=lease, step=step)]))
        assert stop == (frozenset() if self.holds(lease) else {lease.token})

    @rule(lease=leases, well=st.booleans())
    def end(self, lease: Lease, well: bool) -> None:
        store = self.lab.store
        ended = self.do(store.finish(lease, RESULT) if well else store.fail(lease, FAILURE))
        known = self.holds(lease)
        assert ended == (known is not None)
        if known:
            known.status = JobStatus.SUCCEEDED if well else JobStatus.FAILED

    @rule(lease=consumes(leases), crashed=st.booleans())
    def give_back(self, lease: Lease, crashed: bool) -> None:
        given = self.do(self.lab.store.give_back(lease, crashed=crashed))
        known = self.holds(lease)
        if known:
            known.crashes += crashed and lease.alone
            known.lost += crashed and not lease.alone
            self.requeue(known)
        assert given is (known.status if known else None)

    @rule(name=jobs, abandon=st.booleans())
    def cancel(self, name: str, abandon: bool) -> None:
        store, known = self.lab.store, self.known[name]
        changed = self.do(store.abandon(name, FAILURE) if abandon else store.cancel(name))
        assert changed == (not known.status.terminal)
        if changed:
            known.status = JobStatus.FAILED if abandon else JobStatus.CANCELLED

    @rule(seconds=st.sampled_from([4, 24]))
    def pass_time(self, seconds: int) -> None:
        self.do(self.lab.pass_time(seconds))
        self.now_s += seconds

    @rule()
    def reap(self) -> None:
        queued = self.do(self.lab.store.reap())
        expected = 0
        for name, known in self.known.items():
            self.learn_expiry(name)
            if known.status is R and self.now_s - known.beat_s > LEASE_S:
                known.lost += 1
                self.requeue(known)
                expected += known.status is Q
        assert queued == expected

    def learn_expiry(self, name: str) -> None:
        """Deadlines are found out at claims and reaps, never before their time."""
        known = self.known[name]
        state = self.do(self.lab.store.get(name))
        assert state is not None
        if state.status is JobStatus.EXPIRED and not known.status.terminal:
            assert known.deadline_s is not None
            assert self.now_s >= known.deadline_s
            known.status = JobStatus.EXPIRED

    # ---- invariants

    @invariant()
    def states_agree(self) -> None:
        for name, known in self.known.items():
            state = self.do(self.lab.store.get(name))
            assert state is not None
            assert (state.status, state.attempt) == (known.status, known.attempt), name
            assert (state.queue_position is not None) == (known.status is Q)
        ends = self.do(self.lab.store.ends(self.known))
        assert {name: end.status for name, end in ends.items()} == {
            name: known.status for name, known in self.known.items() if known.status.terminal
        }

    @invariant()
    def sums_agree(self) -> None:
        open_jobs = [known for known in self.known.values() if not known.status.terminal]
        for tenant in (None, "a", "b"):
            own = [known.n for known in open_jobs if tenant in (None, known.tenant)]
            backlog = self.do(self.lab.store.backlog(tenant))
            assert (backlog.jobs, backlog.rows) == (len(own), sum(own))
        counted: Counter[JobStatus | None] = Counter()
        for total in self.do(self.lab.store.totals()):
            counted[total.status] += total.count
        ended = Counter(known.status for known in self.known.values() if known.status.terminal)
        assert counted == Counter({None: len(self.known), **ended})


@pytest.mark.parametrize("name", sorted(LABS))
def test_a_store_is_what_its_model_says(name: str) -> None:
    machine = type(f"{name.title()}Machine", (StoreMachine,), {"lab_name": name})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
