"""Stage two: the chain of halvings, a network for every step count or one for all; and the encoders' chain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from distill_jobs.draws import Draw, Draws
from distill_jobs.halving import HalvingTables, halving_loss, target_loss
from distill_jobs.phases import Phases
from distill_jobs.sections import ChainSection, Halving
from distill_jobs.shared_weights import Grids
from distill_jobs.state import RowLoss
from distill_jobs.student import fold_grid, load_stock, takes_grid, told_its_grid
from engines.schedule import NoiseSchedule


def train_stage_two(phases: Phases) -> None:
    """Every student of the chain."""
    section = phases.recipe.stage_two
    if section.weights == "shared":
        _share(phases)
    else:
        tables = partial(HalvingTables.of, sampler=section.sampler)
        _halve_all(phases, "d", section, tables, phases.folder.student)


def train_encoders(phases: Phases) -> None:
    """Every encoder, where the recipe asks for them."""
    if phases.recipe.encoder is not None:
        _halve_all(phases, "e", phases.recipe.encoder, HalvingTables.encoding, phases.folder.encoder)


def _halve_all(
    phases: Phases,
    prefix: str,
    section: ChainSection,
    tables: Callable[[NoiseSchedule, int, torch.device], HalvingTables],
    folder: Callable[[int], Path],
) -> None:
    """A chain of networks, each with half the steps of the one before; the first learns from stage one."""
    source = phases.folder.stage_one
    for halving in section.halvings:
        n = halving.steps
        if not phases.stands(folder(n)):
            halves = tables(phases.schedule, n, phases.device)
            _halve(phases, f"{prefix}{n}", section, halving, halves, source, folder(n))
        source = folder(n)


def _halve(
    phases: Phases,
    name: str,
    section: ChainSection,
    halving: Halving,
    halves: HalvingTables,
    source: Path,
    folder: Path,
) -> None:
    """Train a copy of the network in ``source`` to do in one step what that network does in two."""
    teacher = phases.frozen(source)

    def loss(network: nn.Module, draws: Draws, update: int, batch: int) -> RowLoss:
        point = (draws.stratified(update, batch, Draw.TIME) * halving.steps).long().to(phases.device)
        rows = phases.noisy(draws, update, batch, halves.t[point])
        w = phases.weights(draws, update, batch, section.unguided_share)
        losses = halving_loss(network, teacher, phases.tables, halves, rows, point, w)
        return RowLoss(losses / (1 + w) ** section.w_power, w)

    phases.train(name, section.training(halving), lambda: load_stock(source), loss, folder)


def _share(phases: Phases) -> None:
    """Teach one network grid after grid; then fold it into a plain student for each."""
    halvings = phases.recipe.stage_two.halvings
    steps = tuple(halving.steps for halving in halvings)
    source = phases.folder.stage_one
    for position, halving in enumerate(halvings):
        _learn_grid(phases, source, steps[: position + 1], halving)
        source = phases.folder.shared(halving.steps)
    for n in steps:
        if not phases.processes.first((phases.folder.student(n) / "unet").is_dir):
            phases.write(phases.folder.student(n), fold_grid(load_stock(source), n))


def _learn_grid(phases: Phases, source: Path, steps: tuple[int, ...], halving: Halving) -> None:
    """Train the network in ``source`` on the last of ``steps``, rehearsing the others."""
    section, folder = phases.recipe.stage_two, phases.folder.shared(halving.steps)
    if phases.stands(folder):
        return

    def begin() -> UNet2DConditionModel:
        network = load_stock(source)
        return network if takes_grid(network) else told_its_grid(network)

    grids = Grids.of(phases.schedule, steps, halving.newest_share, phases.device)
    anchor = phases.frozen(phases.folder.stage_one)
    snapshot = phases.processes.frozen(begin())

    def loss(network: nn.Module, draws: Draws, update: int, batch: int) -> RowLoss:
        drawn = grids.draw(draws, update, batch)
        rows = phases.noisy(draws, update, batch, grids.tables.t[drawn.point])
        w = phases.weights(draws, update, batch, section.unguided_share)
        z_t, _ = phases.tables.noisy(rows)
        target = grids.target(anchor, snapshot, z_t, rows, drawn, w)
        losses = target_loss(network, phases.tables, z_t, rows, w, target, drawn.grid)
        return RowLoss(losses / (1 + w) ** section.w_power, w)

    phases.train(f"d{halving.steps}", section.training(halving), begin, loss, folder)
