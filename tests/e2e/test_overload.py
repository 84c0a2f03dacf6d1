"""More than a server can take, and a tenant that asks for a hundred times more than another: no clock is judged."""

from __future__ import annotations

from pathlib import Path

from server.jobs import Job
from server.stores.fair_queue import FairQueue
from tests.contract.lab import job
from tests.support.job_calls import JOBS, ended, error, submit
from tests.support.live import live

ROWS = 20


def test_what_is_beyond_the_queue_is_refused_and_what_was_accepted_is_made(toy_bundle: Path) -> None:
    with live(toy_bundle, max_queued_rows=ROWS, max_queue_s=1000.0) as running, running.client() as api:
        running.bench.hold()
        answers = [api.post(JOBS, json={"prompt": "one", "seed": k}) for k in range(10 * ROWS)]
        accepted = [answer.json() for answer in answers if answer.status_code == 202]
        refused = [answer for answer in answers if answer.status_code != 202]
        assert len(accepted) == ROWS
        assert {error(answer) for answer in refused} == {(503, "queue_full")}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        running.bench.allow()
        assert {ended(api, taken)["status"] for taken in accepted} == {"succeeded"}
        assert ended(api, submit(api))["status"] == "succeeded"


def test_a_hundredfold_load_of_another_delays_a_tenant_by_one_job() -> None:
    """A worker of one place, a second a job; time is counted, not waited for."""
    queue, waits = FairQueue(), []
    due: dict[str, float] = {}
    for second in range(200):
        for k in range(100):
            queue.add(_at(f"a{second}.{k}", "a", second))
        if second % 3 == 0:
            queue.add(_at(f"b{second}", "b", second))
            due[f"b{second}"] = second
        taken = queue.head(("m",))
        assert taken is not None
        queue.take(taken)
        if taken.tenant == "b":
            waits.append(second - due[taken.id])
    assert len(waits) == len(due)
    assert max(waits) <= 1


def _at(name: str, tenant: str, second: float) -> Job:
    return job(name, tenant=tenant).model_copy(update={"created_s": float(second)})
