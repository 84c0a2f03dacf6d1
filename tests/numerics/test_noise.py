"""Noise addressed by (seed, step, purpose): reproducible, independent, standard normal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.noise import MAX_SEED, Purpose, row_noise

SHAPE = (4, 32, 32)
seeds = st.integers(0, MAX_SEED)


@given(seeds, st.integers(0, 63), st.sampled_from(Purpose))
def test_a_draw_is_a_function_of_its_address(seed: int, step: int, purpose: Purpose) -> None:
    first = row_noise(seed, (1, 8, 8), purpose, step)
    row_noise(seed ^ 1, (3, 5), purpose, step)  # another row drawn in between changes nothing
    np.testing.assert_array_equal(first, row_noise(seed, (1, 8, 8), purpose, step))
    assert first.dtype == np.float32


def test_an_address_is_the_counters_words() -> None:
    """Fixed for good: another place for a word would make every image another one."""
    assert [(purpose.name, purpose.value) for purpose in Purpose] == [("INITIAL", 0), ("STEP", 1), ("VAE", 2)]
    bits = np.random.Philox(key=np.array([5, 0], np.uint64), counter=np.array([0, 3, 1, 0], np.uint64))
    expected = np.random.Generator(bits).standard_normal((2, 4), dtype=np.float32)
    np.testing.assert_array_equal(row_noise(5, (2, 4), Purpose.STEP, 3), expected)


@given(seeds)
def test_seeds_steps_and_purposes_give_different_noise(seed: int) -> None:
    draws = [row_noise(seed, (64,), purpose, step) for purpose in Purpose for step in range(4)]
    draws.append(row_noise(seed - 1 if seed else 1, (64,), Purpose.INITIAL))
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert not np.isin(one, other).all()


def test_addresses_are_uncorrelated_and_normal() -> None:
    draws = [row_noise(seed, SHAPE, p, step).ravel() for seed in range(8) for p in Purpose for step in range(3)]
    rows = np.stack(draws)
    size = rows.shape[1]
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlation).max() < 6 / np.sqrt(size)
    flat = rows.astype(np.float64).ravel()
    assert abs(flat.mean()) < 5 / np.sqrt(flat.size)
    assert abs(flat.var() - 1) < 5 * np.sqrt(2 / flat.size)
    assert abs((flat**4).mean() - 3) < 5 * np.sqrt(96 / flat.size)
    assert 0 < (np.abs(flat) > 3).mean() < 0.0035


def test_a_smaller_row_is_the_start_of_a_larger_one_of_the_same_address() -> None:
    small = row_noise(7, (16,), Purpose.INITIAL)
    np.testing.assert_array_equal(small, row_noise(7, (64,), Purpose.INITIAL)[:16])


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1])
def test_seeds_outside_the_exact_json_range_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed must be"):
        row_noise(seed, (1,), Purpose.INITIAL)


@pytest.mark.parametrize("seed", [0, MAX_SEED])
def test_both_ends_of_the_seed_range_work(seed: int) -> None:
    assert np.isfinite(row_noise(seed, (8,), Purpose.INITIAL)).all()
