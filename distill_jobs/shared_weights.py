"""One set of weights for every step count: a student told its grid, trained on all the grids learned so far.

In the phase of N a share of the rows is on the new grid, the others rehearse the grids before it. Each row's
teacher is the network as the phase found it, on the row's grid 2N'; the coarsest teacher of all, above the first
grid, is the stage-one student and stays it, so that the chain is anchored to what never changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill_jobs.draws import Draw, Draws
from distill_jobs.halving import HalvingTables, two_step_target
from distill_jobs.objectives import Noisy
from engines.schedule import NoiseSchedule


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
        self, anchor: nn.Module, snapshot: nn.Module, z_t: Tensor, rows: Noisy, drawn: GridRows, w: Tensor
    ) -> Tensor:
        """The target v of every row, shaped as z_t.

        anchor: the stage-one student, for rows on the oldest grid; snapshot: for all others.
        """
        target = torch.empty_like(z_t)
        oldest = drawn.grid == self.steps[0]
        if bool(oldest.any()):
            at = rows[oldest]
            target[oldest] = two_step_target(anchor, self.tables, z_t[oldest], at, drawn.point[oldest], w[oldest])
        if not bool(oldest.all()):
            newer = ~oldest
            point, grid = drawn.point[newer], 2 * drawn.grid[newer]
            target[newer] = two_step_target(snapshot, self.tables, z_t[newer], rows[newer], point, w[newer], grid)
        return target
