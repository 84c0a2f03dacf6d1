"""Between a worker and two engines: what the former did not begin goes to its successor, and questions end."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import numpy as np
import pytest

from engines.errors import BackendError
from server.costs import Offer
from server.engine import Report
from server.engine_switch import EngineSwitch
from server.jobs import Job, JobFailure, Lease
from server.request import DenoiseRequest
from server.work import Died, Event, Failed, Made
from tests.support.workers import until

pytestmark = pytest.mark.anyio


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
