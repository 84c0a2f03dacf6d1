"""Training randomness: addressed, so a resumed job draws the same."""

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from distill_jobs.draws import Draw, Draws


def test_draws_depend_on_their_address_alone() -> None:
    first, again = Draws(3, "teacher"), Draws(3, "teacher")
    first.normal(0, (4,))
    assert torch.equal(first.normal(9, (2, 3)), again.normal(9, (2, 3)))


def test_seed_phase_update_and_purpose_all_change_the_draw() -> None:
    base = Draws(3, "teacher").normal(9, (8,))
    others = [
        Draws(4, "teacher").normal(9, (8,)),
        Draws(3, "stage_one").normal(9, (8,)),
        Draws(3, "teacher").normal(10, (8,)),
        Draws(3, "teacher").normal(9, (8,), Draw.TIME),
    ]
    assert all(not torch.equal(base, other) for other in others)


def test_every_epoch_shows_every_row_once_in_its_own_order() -> None:
    draws = Draws(0, "teacher")
    seen = torch.cat([draws.indices(update, 5, 10) for update in range(4)])
    first, second = seen[:10], seen[10:]
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()


def test_a_batch_may_span_epochs() -> None:
    assert sorted(Draws(0, "p").indices(0, 20, 10).tolist()) == sorted([*range(10), *range(10)])


def test_stratified_times_fall_one_in_each_cell() -> None:
    values = Draws(0, "p").stratified(0, 64, Draw.TIME)
    assert sorted((values * 64).long().tolist()) == list(range(64))
    assert values.tolist() != sorted(values.tolist())


@pytest.mark.parametrize(
    "draw",
    [
        lambda draws, rows: draws.indices(3, rows, 10),
        lambda draws, rows: draws.normal(3, (rows, 2, 3)),
        lambda draws, rows: draws.uniform(3, rows, Draw.DROPOUT),
        lambda draws, rows: draws.stratified(3, rows, Draw.TIME),
    ],
    ids=["indices", "normal", "uniform", "stratified"],
)
def test_the_shares_of_a_batch_are_the_batch(draw: Callable[[Draws, int], torch.Tensor]) -> None:
    draws = Draws(5, "teacher")
    halves = [draw(draws.share(k, 2), 12) for k in range(2)]
    sixths = [draw(draws.share(k, 2).share(m, 3), 4) for k in range(2) for m in range(3)]
    assert torch.equal(torch.cat(halves), draw(draws, 24))
    assert torch.equal(torch.cat(sixths), draw(draws, 24))


def test_the_shares_of_a_batch_draw_it_once_and_keep_it_no_longer_than_its_update(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, Draw, int]] = []
    generator = Draws._generator

    def watched(self: Draws, update: int, purpose: Draw, step: int = 0) -> np.random.Generator:
        asked.append((update, purpose, step))
        return generator(self, update, purpose, step)

    monkeypatch.setattr(Draws, "_generator", watched)
    draws = Draws(5, "teacher")
    shares = [draws.share(1, 2).share(k, 3) for k in range(3)]
    for update in (3, 5, 3):
        for share in shares:
            share.normal(update, (4, 2))
            share.normal(update, (4, 2), step=1)
            share.stratified(update, 4, Draw.TIME)
    once = [(Draw.NOISE, 0), (Draw.NOISE, 1), (Draw.TIME, 0)]
    assert asked == [(update, *each) for update in (3, 5, 3) for each in once]


def test_what_is_drawn_update_after_update_is_drawn_ahead_and_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    by_thread: dict[tuple[int, Draw], str] = {}
    generator = Draws._generator

    def watched(self: Draws, update: int, purpose: Draw, step: int = 0) -> np.random.Generator:
        assert (update, purpose) not in by_thread, "drawn twice"
        by_thread[update, purpose] = threading.current_thread().name
        return generator(self, update, purpose, step)

    expected = [Draws(5, "teacher").normal(update, (8, 3)) for update in range(4)]
    monkeypatch.setattr(Draws, "_generator", watched)
    mine = Draws(5, "teacher").share(1, 2)
    for update in range(4):
        assert torch.equal(mine.normal(update, (4, 3)), expected[update][4:])
    mine.normal(0, (4, 3), Draw.LATENT)
    main, ahead = threading.current_thread().name, "ahead_0"
    assert [by_thread[update, Draw.NOISE] for update in range(4)] == [main, main, ahead, ahead]
    assert by_thread[0, Draw.LATENT] == main
    assert (1, Draw.LATENT) not in by_thread


def test_orders_that_another_thread_puts_in_place_take_none_away() -> None:
    batches = Draws(5, "teacher")._batches

    def drawn_while_others_are() -> np.ndarray:
        for epoch in (7, 8):
            batches.order(epoch, 4, lambda: np.arange(4))
        return np.arange(4)[::-1]

    assert batches.order(6, 4, drawn_while_others_are).tolist() == [3, 2, 1, 0]


def test_a_rewind_finds_the_draws_of_its_update() -> None:
    draws = Draws(5, "teacher")
    expected = [Draws(5, "teacher").normal(update, (8, 3)) for update in range(4)]
    for update in (0, 1, 2, 1, 2, 3):
        assert torch.equal(draws.normal(update, (8, 3)), expected[update])


def test_the_shares_of_a_batch_have_one_order_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    epochs: list[int] = []
    generator = Draws._generator

    def watched(self: Draws, update: int, purpose: Draw, step: int = 0) -> np.random.Generator:
        epochs.append(update)
        return generator(self, update, purpose, step)

    monkeypatch.setattr(Draws, "_generator", watched)
    mine = Draws(5, "teacher").share(1, 2)
    micro_batches = [mine.share(k, 4) for k in range(4)]
    for update in range(10):
        for share in micro_batches:
            share.indices(update, 1, 20)
    assert epochs == [0, 1, 2, 3]


def test_rows_that_are_changed_are_drawn_as_before_by_who_draws_them_again() -> None:
    share = Draws(5, "teacher").share(1, 2)
    first = share.normal(3, (4, 2))
    expected = first.clone()
    first.zero_()
    assert torch.equal(share.normal(3, (4, 2)), expected)


def test_shapes_and_kinds_of_one_purpose_are_drawn_apart() -> None:
    share, alone = Draws(5, "teacher").share(0, 2), Draws(5, "teacher")
    share.uniform(3, 4, Draw.MASK)
    assert torch.equal(share.uniforms(3, (4, 2), Draw.MASK), alone.uniforms(3, (8, 2), Draw.MASK)[:4])
    assert torch.equal(share.stratified(3, 4, Draw.MASK), alone.stratified(3, 8, Draw.MASK)[:4])
    assert torch.equal(share.normal(3, (4, 2)), alone.normal(3, (8, 2))[:4])
    assert torch.equal(share.normal(3, (4, 3)), alone.normal(3, (8, 3))[:4])
