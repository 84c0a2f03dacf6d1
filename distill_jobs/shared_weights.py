"""One set of weights for every step count: a student told its grid, trained on all the grids learned so far.

In the phase of N a share of the rows is on the new grid, the others rehearse the grids before it. Each row's
teacher is the network as the phase found it, on the row's grid 2N'; above the first grid it is the stage-one
student or the teacher's true guidance and stays it, so that the chain is anchored to what never changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from distill_jobs.draws import Draw, Draws
from distill_jobs.halving import HalvingTables, drawn_points, two_step_target
from distill_jobs.objectives import Noisy, Tables, network_v
from engines.schedule import NoiseSchedule


class Anchor(Protocol):
    """What the chain begins with: the v of rows at z_t with guidance weights w: (B,), shaped as z_t."""

    def __call__(self, z_t: Tensor, rows: Noisy, *, w: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class GridRows:
    """grid: (B,) the step count of each row; point: (B,) its row in the tables of all grids."""

    grid: Tensor
    point: Tensor


@dataclass(frozen=True)
class Grids:
    """The grids of one phase, oldest (finest) first, the new one last.

    tables, guided: of all of them, one after the other: guided, (points,) bool, whose stretch has guidance in it.
    newest_share: of the rows; guided_share: of a grid's rows, null for all of its points equally often.
    """

    steps: tuple[int, ...]
    tables: HalvingTables
    guided: Tensor
    newest_share: float
    guided_share: float | None = None

    @classmethod
    def of(
        cls,
        schedule: NoiseSchedule,
        steps: tuple[int, ...],
        tables: Tables,
        newest_share: float,
        guided_share: float | None = None,
    ) -> Grids:
        of_each = [HalvingTables.of(schedule, n, tables.off.device) for n in steps]
        joined = HalvingTables.cat(of_each)
        return cls(steps, joined, joined.guided(tables.off, of_each[0]), newest_share, guided_share)

    def draw(self, draws: Draws, update: int, rows: int) -> GridRows:
        """A grid and a point on it for each row: the new grid with its share, the others equally often."""
        older = len(self.steps) - 1
        share = (1 - self.newest_share) / max(older, 1)
        edges = share * torch.arange(1, older + 1, dtype=torch.float64)
        which = torch.bucketize(draws.stratified(update, rows, Draw.GRID), edges, right=True)
        grid = torch.tensor(self.steps)[which]
        at, ends = draws.stratified(update, rows, Draw.TIME), [sum(self.steps[:k]) for k in range(len(self.steps))]
        points = [
            first + drawn_points(at, self.guided[first : first + n], self.guided_share)
            for first, n in zip(ends, self.steps, strict=True)
        ]
        point = torch.stack(points)[which, torch.arange(rows)]
        device = self.tables.t.device
        return GridRows(grid.to(device), point.to(device))

    @torch.no_grad()
    def target(
        self, anchor: Anchor, snapshot: nn.Module, z_t: Tensor, rows: Noisy, drawn: GridRows, w: Tensor
    ) -> Tensor:
        """The target v of every row, shaped as z_t.

        anchor: for rows on the oldest grid; snapshot: the network as the phase found it, for all others.
        """
        target = torch.empty_like(z_t)
        oldest = drawn.grid == self.steps[0]
        of_oldest = partial(anchor, w=w[oldest])
        of_newer = partial(network_v, snapshot, w=w[~oldest], grid=2 * drawn.grid[~oldest])
        for which, field in ((oldest, of_oldest), (~oldest, of_newer)):
            if bool(which.any()):
                at, point = rows[which], drawn.point[which]
                target[which] = two_step_target(field, self.tables, z_t[which], at, point)
        return target
