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
from distill_jobs.halving import HalvingTables, two_step_target
from distill_jobs.objectives import Noisy, network_v
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

    tables: of all of them, one after the other; newest_share: of the rows.
    """

    steps: tuple[int, ...]
    tables: HalvingTables
    newest_share: float

    @classmethod
    def of(
        cls, schedule: NoiseSchedule, steps: tuple[int, ...], newest_share: float, device: torch.device
    ) -> Grids:
        return cls(steps, HalvingTables.cat([HalvingTables.of(schedule, n, device) for n in steps]), newest_share)

    def draw(self, draws: Draws, update: int, rows: int) -> GridRows:
        """A grid and a point on it for each row: the new grid with its share, the others equally often."""
        older = len(self.steps) - 1
        share = (1 - self.newest_share) / max(older, 1)
        edges = share * torch.arange(1, older + 1, dtype=torch.float64)
        which = torch.bucketize(draws.stratified(update, rows, Draw.GRID), edges, right=True)
        grid = torch.tensor(self.steps)[which]
        first = torch.tensor([sum(self.steps[:k]) for k in range(len(self.steps))])[which]
        point = first + (draws.stratified(update, rows, Draw.TIME) * grid).long()
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
