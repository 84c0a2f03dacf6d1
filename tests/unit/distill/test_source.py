"""Sources: a batch is a function of its address, and conditions are handled row by row."""

from typing import Any

import torch
from torch import Tensor

from distill_jobs.data.digits import NULL_CLASS, Digits, DigitsSource, class_condition
from distill_jobs.data.latents import LatentSource
from distill_jobs.data.source import Condition
from distill_jobs.draws import Draws
from distill_jobs.pipelines.vae import Encoded


def condition(*values: float, added: bool = True) -> Condition:
    """Rows whose every entry is the row's value."""
    column = torch.tensor(values)
    tokens = column[:, None, None].expand(-1, 2, 3)
    return (
        Condition(tokens, column[:, None].expand(-1, 4), column[:, None].expand(-1, 6))
        if added
        else Condition(tokens)
    )


def parts(rows: Condition) -> list[list[float]]:
    """The value of each row, for every part present."""
    present = [part for part in (rows.tokens, rows.pooled, rows.time_ids) if part is not None]
    return [part.flatten(1)[:, 0].tolist() for part in present]


def test_digits_batches_depend_on_their_address_alone() -> None:
    source, draws = DigitsSource(Digits.load()), Draws(0, "teacher")
    first = source.batch(draws, 5, 8)
    source.batch(draws, 6, 8)
    again = DigitsSource(Digits.load()).batch(Draws(0, "teacher"), 5, 8)
    assert source.shape == (1, 8, 8)
    assert first.x.shape == (8, 1, 8, 8)
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.condition.tokens, again.condition.tokens)
    assert not torch.equal(first.x, source.batch(draws, 6, 8).x)
    assert first.extra is None


def test_the_empty_condition_is_a_class_of_its_own() -> None:
    null = DigitsSource(Digits.load()).null(3)
    assert torch.equal(null.tokens, class_condition(torch.tensor([NULL_CLASS] * 3)).tokens)


def test_latents_are_drawn_afresh_from_what_the_autoencoder_gave_of_each() -> None:
    """Images 0 to 9 of mean 10·i and deviation i + 1."""

    class Cache:
        def __len__(self) -> int:
            return 10

        def rows(self, indices: Tensor) -> tuple[Encoded, Condition]:
            wide = indices.float()[:, None, None, None].expand(-1, 4, 16, 16)
            return Encoded(10 * wide, wide + 1), Condition(indices.float()[:, None, None])

    cache: Any = Cache()
    source, draws = LatentSource(cache, (4, 16, 16), (), 128), Draws(0, "stage_one")
    first, again, next_epoch = source.batch(draws, 0, 10), source.batch(draws, 0, 10), source.batch(draws, 1, 10)
    assert torch.equal(first.x, again.x)
    for batch in (first, next_epoch):
        image = batch.condition.tokens[:, 0, 0]
        torch.testing.assert_close(batch.x.mean((1, 2, 3)), 10 * image, rtol=0, atol=1.5)
        torch.testing.assert_close(batch.x.std((1, 2, 3)), image + 1, rtol=0.1, atol=0)
    order = [batch.condition.tokens[:, 0, 0].argsort() for batch in (first, next_epoch)]
    assert float((first.x[order[0]] - next_epoch.x[order[1]]).abs().mean()) > 1


def test_where_cat_rows_and_expand_keep_every_part_together() -> None:
    one, other = condition(1, 2, 3), condition(7, 8, 9)
    assert parts(one.where(torch.tensor([True, False, True]), other)) == [[1, 8, 3]] * 3
    assert parts(Condition.cat([one, other])) == [[1, 2, 3, 7, 8, 9]] * 3
    assert parts(one[1:]) == [[2, 3]] * 3
    assert parts(one[:1].expand(3)) == [[1, 1, 1]] * 3
    assert parts(one.to("cpu")) == parts(one)


def test_conditions_without_added_parts_stay_so() -> None:
    one, other = condition(1, 2, added=False), condition(7, 8, added=False)
    for rows in (one.where(torch.tensor([True, False]), other), Condition.cat([one, other]), one[:1].expand(2)):
        assert (rows.pooled, rows.time_ids) == (None, None)
