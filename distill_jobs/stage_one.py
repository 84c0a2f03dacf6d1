"""The teacher, and stage one: a student that is the guided teacher in one evaluation, and its gate."""

from __future__ import annotations

import json

import torch
from torch import nn

from distill_jobs.checkpoint import write_text
from distill_jobs.draws import Draw, Draws
from distill_jobs.errors import DivergedError
from distill_jobs.objectives import guided_v, stage_one_loss, teacher_loss
from distill_jobs.phases import Phases
from distill_jobs.state import RowLoss
from distill_jobs.student import load_stock, new_teacher, predict, student_of
from engines.guidance import weight_from_scale

GATE_ROWS = 512
GATE_SCALES = 5


def train_teacher(phases: Phases) -> None:
    """A guidable teacher: its condition is dropped on a share of the rows."""
    recipe, section = phases.recipe, phases.recipe.teacher

    def loss(network: nn.Module, draws: Draws, update: int, batch: int) -> RowLoss:
        rows = phases.noisy(draws, update, batch)
        dropped = draws.uniform(update, batch, Draw.DROPOUT) < section.condition_dropout
        return RowLoss(teacher_loss(network, phases.tables, rows, dropped.to(phases.device)))

    phases.train("teacher", section, lambda: new_teacher(recipe.unet, recipe.seed), loss, phases.folder.teacher)


def train_stage_one(phases: Phases) -> None:
    """The w-conditioned student of the guided teacher, and its gate. Raises: DivergedError when it is missed."""
    section, folder = phases.recipe.stage_one, phases.folder
    if phases.processes.first(folder.gate.is_file):
        return
    teacher = phases.frozen(folder.teacher)

    def loss(network: nn.Module, draws: Draws, update: int, batch: int) -> RowLoss:
        rows = phases.noisy(draws, update, batch)
        w = phases.weights(draws, update, batch, section.unguided_share)
        return RowLoss(stage_one_loss(network, teacher, phases.tables, rows, w) / (1 + w) ** section.w_power, w)

    phases.train("stage_one", section, lambda: student_of(load_stock(folder.teacher)), loss, folder.stage_one)
    _gate(phases, teacher)


def _gate(phases: Phases, teacher: nn.Module) -> None:
    """Refuse a stage-one student that is not yet the guided teacher: every halving inherits its error."""
    found = guidance_errors(phases, phases.frozen(phases.folder.stage_one), teacher)
    errors = phases.processes.first(lambda: found)
    shown = ", ".join(f"{scale:g}: {error:.4f}" for scale, error in errors.items())
    phases.say(f"stage one, relative v-error by guidance_scale: {shown}")
    worst = max(errors, key=lambda scale: errors[scale])
    if not errors[worst] <= phases.recipe.stage_one.max_relative_error:
        raise DivergedError(
            f"stage one misses its gate: relative v-error {errors[worst]:.4f} at guidance_scale {worst:g}, "
            f"allowed {phases.recipe.stage_one.max_relative_error:g}; "
            "train it longer (stage_one.updates) in a new run folder"
        )
    passed = json.dumps({"relative_v_error": {f"{scale:g}": error for scale, error in errors.items()}})
    phases.processes.first(lambda: write_text(phases.folder.gate, passed + "\n"))


@torch.inference_mode()
def guidance_errors(phases: Phases, student: nn.Module, teacher: nn.Module) -> dict[float, float]:
    """|v_student - v_guided|² / |v_guided|² on the same rows, by guidance_scale."""
    rows = phases.noisy(Draws(phases.recipe.seed, "gate"), 0, GATE_ROWS)
    z_t, _ = phases.tables.noisy(rows)
    errors, allowed = {}, phases.recipe.guidance
    for scale in torch.linspace(allowed.min, allowed.max, GATE_SCALES).tolist():
        w = torch.full((GATE_ROWS,), weight_from_scale(scale), device=phases.device)
        target = guided_v(teacher, z_t, rows, w)
        error = predict(student, z_t, rows.t, rows.condition, w, rows.extra) - target
        errors[scale] = float(error.square().sum() / target.square().sum())
    return errors
