"""Rates and quotas that several API processes count together."""

from __future__ import annotations

import math
import sys

import pytest

from server.rates import Rates
from server.stores.base import StoreUnavailableError
from tests.contract.redis_lab import SLOW_MACHINE_S
from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.anyio


async def test_two_processes_share_a_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkey", None)  # which the images do not have
    with RedisServer() as server:
        one, other = (Rates(server.url, SLOW_MACHINE_S) for _ in range(2))
        assert await one.spend("3/day", 2, "quota", "a") is None
        wait_s = await other.spend("3/day", 2, "quota", "a")
        assert 0 < (wait_s or 0) <= 86_400.01  # a day, and a millisecond on top
        assert await other.spend("3/day", 2, "quota", "b") is None
        assert await other.spend("3/day", 4, "quota", "b") == math.inf


async def test_a_redis_that_is_frozen_is_away_after_the_time_of_one_answer() -> None:
    with RedisServer() as server:
        rates = Rates(server.url, answer_s=0.2)
        server.freeze()
        with pytest.raises(StoreUnavailableError):
            await rates.spend("3/day", 1, "quota", "a")
        server.thaw()
