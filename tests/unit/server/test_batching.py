"""Batches: every row gets exactly its steps, nobody starves, and only rows of one key meet."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.batching import Batcher, Ticket

RUNGS = (1, 2, 4, 8)


def choose_rung(_: str, waiting: int) -> int:
    return next((rung for rung in RUNGS if rung >= waiting), RUNGS[-1])


def ticket(name: str, key: str = "k", steps: int = 1, joined_s: float = 0.0) -> Ticket[str]:
    return Ticket(name, key, steps, joined_s)


def names(tickets: tuple[Ticket[str], ...]) -> list[str]:
    return [t.row for t in tickets]


def test_idle_has_nothing_to_run() -> None:
    assert Batcher[str](choose_rung).next() is None


def test_one_row_runs_at_once() -> None:
    batcher = Batcher[str](choose_rung)
    batcher.add(ticket("a"))
    batch = batcher.next()
    assert batch is not None
    assert (names(batch.tickets), batch.rung, batch.padding) == (["a"], 1, 0)
    assert names(batcher.stepped(batch)) == ["a"]
    assert len(batcher) == 0


def test_rows_with_different_steps_left_share_a_step() -> None:
    batcher = Batcher[str](choose_rung)
    for name, steps in (("a", 1), ("b", 3), ("c", 2)):
        batcher.add(ticket(name, steps=steps))
    done = []
    while (batch := batcher.next()) is not None:
        done.append((len(batch.tickets), names(batcher.stepped(batch))))
    assert done == [(3, ["a"]), (2, ["c"]), (1, ["b"])]


def test_a_row_joins_between_two_steps_of_others() -> None:
    batcher = Batcher[str](choose_rung)
    batcher.add(ticket("a", steps=2))
    first = batcher.next()
    assert first is not None
    batcher.stepped(first)
    batcher.add(ticket("b", joined_s=1.0))
    second = batcher.next()
    assert second is not None
    assert names(second.tickets) == ["a", "b"]


def test_the_oldest_go_first_however_they_were_added() -> None:
    batcher = Batcher[str](lambda _row, _waiting: 2)
    for name, joined_s in (("young", 3.0), ("old", 1.0), ("middle", 2.0)):
        batcher.add(ticket(name, joined_s=joined_s))
    batch = batcher.next()
    assert batch is not None
    assert names(batch.tickets) == ["old", "middle"]


def test_keys_take_turns() -> None:
    batcher = Batcher[str](choose_rung)
    for key in "ABC":
        batcher.add(ticket(key, key, steps=2))
    order = []
    while (batch := batcher.next()) is not None:
        order.append(batch.key)
        batcher.stepped(batch)
    assert order == ["A", "B", "C", "A", "B", "C"]


def test_removed_rows_run_no_further_step() -> None:
    batcher = Batcher[str](choose_rung)
    a, b = ticket("a", steps=5), ticket("b", "other", steps=5)
    batcher.add(a)
    batcher.add(b)
    batcher.remove([a, ticket("unknown")])
    batch = batcher.next()
    assert batch is not None
    assert (batch.key, names(batch.tickets)) == ("other", ["b"])


def test_a_row_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one step"):
        Batcher[str](choose_rung).add(ticket("a", steps=0))


ARRIVALS = st.lists(
    st.tuples(st.integers(0, 20), st.sampled_from("ABC"), st.integers(1, 8)), min_size=1, max_size=60
)


@given(ARRIVALS, st.sets(st.integers(0, 59)))
def test_every_row_gets_exactly_its_steps(arrivals: list[tuple[int, str, int]], cancelled: set[int]) -> None:
    """Rows arrive over time and some are cancelled midway; the rest get their steps, in legal batches."""
    batcher = Batcher[str](choose_rung)
    steps: Counter[str] = Counter()
    tickets = [ticket(str(i), key, n, float(at)) for i, (at, key, n) in enumerate(arrivals)]
    wanted = [n for _, _, n in arrivals]
    now, gone = 0, set()
    while now <= 20 or len(batcher):
        for t in tickets:
            if t.joined_s == now:
                batcher.add(t)
        if now == 10:
            gone = {
                i for i in cancelled if i < len(tickets) and tickets[i].joined_s <= now and tickets[i].steps_left
            }
            batcher.remove(tickets[i] for i in gone)
        batch = batcher.next()
        if batch is not None:
            assert {t.key for t in batch.tickets} == {batch.key}
            assert batch.rung in RUNGS
            assert 1 <= len(batch.tickets) <= batch.rung
            steps.update(t.row for t in batch.tickets)
            batcher.stepped(batch)
        now += 1
        assert now < 10_000, "the batcher never came to an end"
    for i, n in enumerate(wanted):
        assert steps[str(i)] < n if i in gone else steps[str(i)] == n


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 40))
def test_a_row_is_not_starved_by_a_stream_of_others(keys: int, steps: int, crowd: int) -> None:
    """While every key gets new rows before every step, a row waits only for turns and for older rows."""
    batcher = Batcher[str](choose_rung)
    for i in range(crowd):
        batcher.add(ticket(f"older {i}", "k0", 8, joined_s=-1.0))
    watched = ticket("watched", "k0", steps, joined_s=0.0)
    batcher.add(watched)
    taken = 0
    while watched.steps_left:
        for k in range(keys):
            batcher.add(ticket("younger", f"k{k}", 8, joined_s=1.0 + taken))
        batch = batcher.next()
        assert batch is not None
        batcher.stepped(batch)
        taken += 1
    turns_of_its_key = steps + -(-crowd // RUNGS[-1]) * 8
    assert taken <= turns_of_its_key * keys
