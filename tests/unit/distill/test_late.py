"""Timesteps of a teacher's training: uniform, but for a share of late ones."""

from __future__ import annotations

import pytest
import torch

from distill_jobs.phases import LATE, late


def test_without_a_share_times_are_as_they_were_drawn() -> None:
    u = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(late(u, 0.0), u)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_a_share_is_late_and_the_others_stay_uniform(share: float) -> None:
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    times = late(u, share)
    assert float(times.min()) >= 0
    assert float(times.max()) < 1
    expected = share + (1 - share) * (1 - LATE)
    assert float((times >= LATE).double().mean()) == pytest.approx(expected, abs=1e-3)
    early = times[times < LATE]
    assert torch.histc(early, 10, 0, LATE) == pytest.approx(torch.full((10,), len(early) / 10), rel=1e-2)
