"""Stage two: the chains of halvings, a network for every step count or one for all; and the encoders' chain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from distill_jobs.adapters import Adapters
from distill_jobs.draws import Draw, Draws
from distill_jobs.halving import HalvingTables, drawn_points, target_loss, two_step_target
from distill_jobs.objectives import balanced, guided_v, network_v
from distill_jobs.phases import Phases
from distill_jobs.rollout import Rollout
from distill_jobs.sections import ChainSection, Halving, StageTwoSection
from distill_jobs.shared_weights import Grids
from distill_jobs.state import RowLoss
from distill_jobs.student import Trained, fold_grid, load_stock, takes_grid, told_its_grid
from engines.guidance import weight_from_scale
from engines.schedule import NoiseSchedule


@dataclass(frozen=True)
class Chain:
    """A chain of networks, each with half the steps of the one before.

    prefix: of its phases' names; source: what the first learns from; folder: of the network of a step count;
    unconditional: it learns the empty condition alone; guided: its networks take w.
    """

    prefix: str
    section: ChainSection
    tables: Callable[[NoiseSchedule, int, torch.device], HalvingTables]
    source: Path
    folder: Callable[[int], Path]
    unconditional: bool = False
    guided: bool = True


def train_stage_two(phases: Phases) -> None:
    """Every student of the recipe's chain, or chains."""
    section, folder = phases.recipe.stage_two, phases.folder
    if section.weights == "shared":
        _share(phases)
        return
    tables = partial(HalvingTables.of, sampler=section.sampler)
    if section.guidance != "at_sampling":
        _halve_all(phases, Chain("d", section, tables, folder.stage_one, folder.student))
        return
    of_two = partial(Chain, section=section, tables=tables, source=folder.teacher, guided=False)
    _halve_all(phases, of_two("d", folder=folder.student))
    _halve_all(phases, of_two("u", folder=folder.unconditional, unconditional=True))


def train_encoders(phases: Phases) -> None:
    """Every encoder, where the recipe asks for them."""
    section, folder = phases.recipe.encoder, phases.folder
    if section is not None:
        _halve_all(phases, Chain("e", section, HalvingTables.encoding, folder.stage_one, folder.encoder))


def _halve_all(phases: Phases, chain: Chain) -> None:
    source = chain.source
    for halving in chain.section.halvings:
        folder = chain.folder(halving.steps)
        if not phases.stands(folder):
            _halve(phases, chain, halving, source)
        source = folder


def _halve(phases: Phases, chain: Chain, halving: Halving, source: Path) -> None:
    """Train a copy of the network in ``source`` to do in one step what that network does in two."""
    section, n = chain.section, halving.steps
    halves = chain.tables(phases.schedule, n, phases.device)
    guided = halves.guided(phases.tables.off, chain.tables(phases.schedule, section.steps[0], phases.device))
    less = _counted_less(section, guided)
    own = Rollout.of(phases.recipe, section, n)
    followed = _followed(phases, section, source, first=source == chain.source)
    adapters = Adapters.of(section, base=chain.source, before=None if source == chain.source else source)

    def loss(network: nn.Module, draws: Draws, update: int, batch: int) -> RowLoss:
        at = draws.stratified(update, batch, Draw.TIME)
        point = drawn_points(at, guided, section.guided_share).to(phases.device)
        rows = phases.noisy(draws, update, batch, halves.t[point])
        if chain.unconditional:
            rows = replace(rows, condition=rows.null)
        w = _weights(phases, section, draws, update, batch) if chain.guided else None
        z_t, _ = phases.tables.noisy(rows)
        if own is not None:
            z_t = own.replace(z_t, network, draws, update, rows, point, w)
        target = two_step_target(partial(followed, w=w), halves, z_t, rows, point)
        losses = target_loss(network, phases.tables, z_t, rows, w, target)
        return RowLoss(losses if w is None else balanced(losses, w * less[point], section.w_power), w)

    training, name, folder = section.training(halving), f"{chain.prefix}{n}", chain.folder(n)
    trained = Trained(section.sampler, (n,)) if isinstance(section, StageTwoSection) else None
    if adapters is not None:
        phases.train(name, training, adapters.start, loss, folder, save=adapters.save, trained=trained)
    else:
        phases.train(name, training, lambda: load_stock(source), loss, folder, trained=trained)


def _followed(phases: Phases, section: ChainSection, source: Path, *, first: bool) -> partial[Tensor]:
    """Whose v a halving takes two steps along, given z_t, rows, w: that of ``source``, or true guidance."""
    if first and isinstance(section, StageTwoSection) and section.first_target == "teacher":
        return partial(guided_v, phases.frozen(phases.folder.teacher), phases.tables)
    return partial(network_v, phases.frozen(source))


def _weights(phases: Phases, section: ChainSection, draws: Draws, update: int, batch: int) -> Tensor:
    """(B,) guidance weights: over the recipe's range, or of the one guidance that the chain is for."""
    if isinstance(section, StageTwoSection) and isinstance(section.guidance, float):
        return torch.full((batch,), weight_from_scale(section.guidance), device=phases.device)
    return phases.weights(draws, update, batch, section.unguided_share)


def _counted_less(section: ChainSection, guided: Tensor) -> Tensor:
    """(N,) bool: the points whose rows count less at larger guidance: guided: (N,) bool.

    A chain of one guidance has nothing to balance: there all do, alike.
    """
    single = isinstance(section, StageTwoSection) and isinstance(section.guidance, float)
    return torch.ones_like(guided) if single else guided


def _share(phases: Phases) -> None:
    """Teach one network grid after grid; then fold it into a plain student for each, as it was when it was kept."""
    section = phases.recipe.stage_two
    source = phases.folder.stage_one
    for position, halving in enumerate(section.halvings):
        _learn_grid(phases, source, section.steps[: position + 1], halving)
        source = phases.folder.shared(halving.steps)
    for network in section.networks:
        source = phases.folder.shared(network[-1])
        for n in network:
            if not phases.processes.first((phases.folder.student(n) / "unet").is_dir):
                folded = fold_grid(load_stock(source), n)
                phases.write(phases.folder.student(n), folded, Trained(section.sampler, (n,)))


def _learn_grid(phases: Phases, source: Path, steps: tuple[int, ...], halving: Halving) -> None:
    """Train the network in ``source`` on the last of ``steps``, rehearsing the others."""
    section, folder = phases.recipe.stage_two, phases.folder.shared(halving.steps)
    if phases.stands(folder):
        return

    def begin() -> UNet2DConditionModel:
        network = load_stock(source)
        return network if takes_grid(network) else told_its_grid(network)

    grids = Grids.of(phases.schedule, steps, phases.tables, halving.newest_share, section.guided_share)
    less = _counted_less(section, grids.guided)
    anchor = _followed(phases, section, phases.folder.stage_one, first=True)
    snapshot = phases.processes.frozen(begin())

    def loss(network: nn.Module, draws: Draws, update: int, batch: int) -> RowLoss:
        drawn = grids.draw(draws, update, batch)
        rows = phases.noisy(draws, update, batch, grids.tables.t[drawn.point])
        w = _weights(phases, section, draws, update, batch)
        z_t, _ = phases.tables.noisy(rows)
        target = grids.target(anchor, snapshot, z_t, rows, drawn, w)
        losses = target_loss(network, phases.tables, z_t, rows, w, target, drawn.grid)
        return RowLoss(balanced(losses, w * less[drawn.point], section.w_power), w)

    phases.train(f"d{halving.steps}", section.training(halving), begin, loss, folder)
