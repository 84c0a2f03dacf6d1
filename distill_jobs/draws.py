"""All randomness of training, addressed by (seed, phase, update, purpose, row): a resumed job draws the same bytes.

There is no generator state to save: the update number is the whole cursor, of the data too. Rows are those of the
whole batch, so several processes, or several micro-batches, each with its share, draw what one would draw alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor


class Draw(IntEnum):
    """What a draw is for; part of its address."""

    NOISE = 0
    TIME = 1
    GUIDANCE = 2
    DROPOUT = 3
    ORDER = 4
    GRID = 5
    LATENT = 6
    MASK = 7
    POLICY = 8
    ROLLOUT = 9


@dataclass(frozen=True)
class Share:
    """Share ``index`` of ``of`` equal ones: rows [index·n, (index + 1)·n) of a batch of of·n rows."""

    index: int = 0
    of: int = 1

    def slice(self, rows: int) -> slice:
        """Where this share's ``rows`` stand in the whole batch."""
        return slice(self.index * rows, (self.index + 1) * rows)


ValueT = TypeVar("ValueT")

_Address = tuple[object, ...]


class _Ahead:
    """Makes what the next update needs while the device computes this one.

    Of an address that was asked for at two updates in a row: what is asked for once has no next.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "ahead")
        self._last = dict[_Address, int]()
        self._coming = dict[_Address, tuple[int, Future[Any]]]()

    def get(self, update: int, address: _Address, make: Callable[[int], ValueT]) -> ValueT:
        at, coming = self._coming.pop(address, (None, None))
        made: ValueT = make(update) if coming is None or at != update else coming.result()
        if self._last.get(address) == update - 1:
            self._coming[address] = update + 1, self._thread.submit(make, update + 1)
        self._last[address] = update
        return made


class _Batches:
    """What all shares of a batch take their rows of: what was drawn for the last update, and orders of the data."""

    def __init__(self) -> None:
        self._update, self._drawn = -1, dict[_Address, np.ndarray]()
        self._orders = dict[tuple[int, int], np.ndarray]()
        self.ahead = _Ahead()

    def get(self, update: int, address: _Address, draw: Callable[[int], np.ndarray]) -> np.ndarray:
        """What ``draw`` gives, drawn once an update and address; the update before is forgotten."""
        if update != self._update:
            self._update, self._drawn = update, {}
        if address not in self._drawn:
            self._drawn[address] = self.ahead.get(update, address, draw)
        return self._drawn[address]

    def order(self, epoch: int, rows: int, draw: Callable[[], np.ndarray]) -> np.ndarray:
        """(rows,) what ``draw`` gives: the order of an epoch. The last two are kept, as a batch may span epochs."""
        orders = self._orders  # the thread that reads ahead asks, too, and may put others in their place
        if (epoch, rows) not in orders:
            newest = dict(list(orders.items())[-1:])
            self._orders = orders = {**newest, (epoch, rows): draw()}
        return orders[epoch, rows]


class Draws:
    """Random numbers of one training phase, for one share of every batch. Row counts are the share's own.

    batches: those of the draws that this one is a share of.
    """

    def __init__(self, seed: int, phase: str, share: Share | None = None, batches: _Batches | None = None) -> None:
        self._seed, self._phase, self._share = seed, phase, share or Share()
        self._batches = batches or _Batches()
        self._key = np.array([seed, zlib.crc32(phase.encode())], np.uint64)

    def share(self, index: int, of: int) -> Draws:
        """The same numbers, of one of ``of`` equal shares of each of this share's batches."""
        whole = self._share
        own = Share(whole.index * of + index, whole.of * of)
        return Draws(self._seed, self._phase, own, self._batches)

    def ahead(self, update: int, what: str, make: Callable[[int], ValueT]) -> ValueT:
        """What ``make`` gives for an update, which depends on this share's draws and the update alone.

        That of the next is made in a thread meanwhile, if that of the one before was asked for, too.
        """
        return self._batches.ahead.get(update, (what, self._share), make)

    def indices(self, update: int, batch: int, rows: int) -> Tensor:
        """(batch,) int64 data rows of this update: every epoch is a fresh permutation of all ``rows``."""
        first = (update * self._share.of + self._share.index) * batch
        positions = np.arange(first, first + batch)
        picked = [self._order(int(p) // rows, rows)[int(p) % rows] for p in positions]
        return torch.tensor(np.array(picked, np.int64))

    def normal(self, update: int, shape: tuple[int, ...], purpose: Draw = Draw.NOISE, step: int = 0) -> Tensor:
        """Standard normal float32; shape[0] counts rows. step: a number for each of several of one purpose."""
        rows, *rest = shape

        def draw(whole: int, update: int) -> np.ndarray:
            return self._generator(update, purpose, step).standard_normal((whole, *rest), dtype=np.float32)

        return self._rows(update, rows, ("normal", purpose, step, *rest), draw)

    def uniform(self, update: int, rows: int, purpose: Draw) -> Tensor:
        """(rows,) float64 in [0, 1), independent."""

        def draw(whole: int, update: int) -> np.ndarray:
            return self._generator(update, purpose).random(whole)

        return self._rows(update, rows, ("uniform", purpose), draw)

    def uniforms(self, update: int, shape: tuple[int, int], purpose: Draw) -> Tensor:
        """``shape`` float64 in [0, 1), independent; shape[0] counts rows."""
        rows, columns = shape

        def draw(whole: int, update: int) -> np.ndarray:
            return self._generator(update, purpose).random((whole, columns))

        return self._rows(update, rows, ("uniforms", purpose, columns), draw)

    def stratified(self, update: int, rows: int, purpose: Draw) -> Tensor:
        """(rows,) float64 in [0, 1): over the whole batch one in each of as many equal cells, shuffled.

        Uniform, with less variance.
        """

        def draw(whole: int, update: int) -> np.ndarray:
            generator = self._generator(update, purpose)
            return (generator.permutation(whole) + generator.random(whole)) / whole

        return self._rows(update, rows, ("stratified", purpose), draw)

    def _rows(self, update: int, rows: int, address: _Address, draw: Callable[[int, int], np.ndarray]) -> Tensor:
        """(rows,) this share's part of what ``draw`` gives for the rows of the whole batch, and an update."""
        whole = rows * self._share.of
        drawn = self._batches.get(update, (whole, *address), partial(draw, whole))
        return torch.from_numpy(drawn[self._share.slice(rows)].copy())

    def _order(self, epoch: int, rows: int) -> np.ndarray:
        return self._batches.order(epoch, rows, lambda: self._generator(epoch, Draw.ORDER).permutation(rows))

    def _generator(self, update: int, purpose: Draw, step: int = 0) -> np.random.Generator:
        counter = np.array([0, update, purpose, step], np.uint64)
        return np.random.Generator(np.random.Philox(key=self._key, counter=counter))
