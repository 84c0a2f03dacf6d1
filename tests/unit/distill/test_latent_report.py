"""The gates of runs on latents."""

from __future__ import annotations

from distill_jobs.pipelines.report import distance_gates
from engines.sampler import Sampler
from tests.support.quality import quality


def gates(steps: int, sampler: Sampler) -> list[float]:
    student = quality("student", steps, 1.0, paired=0.8, sampler=sampler)
    return [gate.value for gate in distance_gates([quality("teacher", steps, 1.0, paired=0.4), student])]


def test_fresh_noise_makes_other_images_and_is_no_fault() -> None:
    assert gates(4, "deterministic") == [2.0]
    assert gates(4, "stochastic") == []
