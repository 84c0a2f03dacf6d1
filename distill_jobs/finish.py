"""The consistency phase: a finish after some student of the chain, or in the chain's place after stage one."""

from __future__ import annotations

from torch import nn

from distill_jobs.consistency import ConsistencyTables, consistency_loss
from distill_jobs.draws import Draw, Draws
from distill_jobs.objectives import balanced
from distill_jobs.phases import Phases
from distill_jobs.state import RowLoss
from distill_jobs.student import Trained, load_stock


def train_consistency(phases: Phases) -> None:
    """The consistency student, where the recipe asks for one."""
    section, folder = phases.recipe.consistency, phases.folder.consistency
    if section is None or phases.stands(folder):
        return
    from_stage_one = section.source == "stage_one"
    source = phases.folder.stage_one if from_stage_one else phases.folder.student(int(section.source))
    grid = ConsistencyTables.of(phases.schedule, section.grid, phases.device)
    teacher, average = phases.frozen(source), phases.frozen(source)

    def loss(network: nn.Module, draws: Draws, update: int, batch: int) -> RowLoss:
        point = (draws.stratified(update, batch, Draw.TIME) * section.grid).long().to(phases.device)
        rows = phases.noisy(draws, update, batch, grid.t[point])
        w = phases.weights(draws, update, batch, section.unguided_share)
        losses = consistency_loss(network, average, teacher, phases.tables, grid, rows, point, w, section.huber)
        return RowLoss(balanced(losses, phases.tables.ahead(w, rows.t), section.w_power), w)

    trained = Trained.consistency(section.grid)
    phases.train("consistency", section, lambda: load_stock(source), loss, folder, average, trained=trained)
