"""The teacher, and stage one: a student that is the guided teacher in one evaluation, and its gate."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import nn

from distill_jobs.checkpoint import write_text
from distill_jobs.draws import Draw, Draws
from distill_jobs.errors import DivergedError
from distill_jobs.latent_sections import FinetuneSection, FolderTeacher, MadeTeacher
from distill_jobs.objectives import Tables, balanced, both_ways, guided, stage_one_loss, teacher_loss
from distill_jobs.phases import Phases, Save
from distill_jobs.pipelines.conversion import NativeTeacher, imitation_loss
from distill_jobs.pipelines.encoders import network_sha256
from distill_jobs.pipelines.folder import PipelineFolder
from distill_jobs.pipelines.probe import PROBED_ROWS, contradiction, middle, prediction_errors, unfit
from distill_jobs.pipelines.teacher import load_network
from distill_jobs.recipe_file import GATE_LIMIT
from distill_jobs.sections import TeacherSection
from distill_jobs.state import RowLoss
from distill_jobs.student import load_stock, new_teacher, predict, student_of
from engines.guidance import weight_from_scale
from engines.schedule import NoiseSchedule

GATE_ROWS, GATE_BATCHES = 512, 8
"""The gate's rows, at most that many batches of the phase: who trains few rows cannot wait for many."""

GATE_SCALES = 5


def train_teacher(phases: Phases) -> None:
    """A guidable teacher that gives v: trained from nothing, or a pipeline folder's. Raises: TeacherError.

    A pipeline that was made stands in the run's own teacher folder already.
    """
    recipe, section, folder = phases.recipe, phases.recipe.teacher, phases.folder.teacher
    if isinstance(section, FolderTeacher):
        _teacher_from_folder(phases, section)
    elif not isinstance(section, MadeTeacher):
        learn(phases, "teacher", section, lambda: new_teacher(recipe.unet, recipe.seed), folder)


def _teacher_from_folder(phases: Phases, section: FolderTeacher) -> None:
    """The folder's network, trained to give v on the recipe's schedule where it does not."""
    teacher, folder = phases.teacher, phases.folder.teacher
    assert teacher is not None
    if section.v_finetune is not None:
        phases.processes.first(lambda: phases.folder.keep_given(teacher.path, network_sha256(teacher)))
        if section.v_finetune.target == "teacher":
            _imitate(phases, section.v_finetune, teacher)
        else:
            learn(phases, "v_finetune", section.v_finetune, lambda: load_network(teacher), folder)
    elif not phases.processes.first((folder / "unet").is_dir):
        phases.write(folder, load_network(teacher))


def probe_teacher(phases: Phases) -> None:
    """Hold what a given folder says of its network against the network. Raises: TeacherError when it is another."""
    section, teacher = phases.recipe.teacher, phases.teacher
    assert isinstance(section, FolderTeacher)
    assert teacher is not None
    own = NoiseSchedule(teacher.schedule)
    rows = phases.noisy(Draws(phases.recipe.seed, "probe"), 0, PROBED_ROWS, torch.full((PROBED_ROWS,), middle(own)))
    network = phases.processes.frozen(load_network(teacher))
    tables = Tables.of(own, phases.device)
    found = [prediction_errors(network, tables, rows, prompted=prompted) for prompted in (True, False)]
    errors, unprompted = phases.processes.first(lambda: found)
    if not all(map(math.isfinite, (*errors.values(), *unprompted.values()))):
        raise teacher.wrong("its unet gives NaN or infinity on the data; its weights are damaged")
    if (instead := contradiction(teacher.prediction, errors)) is not None:
        raise teacher.wrong(
            f"scheduler: prediction_type is {teacher.prediction}, but on the data the unet gives {instead}: "
            f"relative errors {errors[teacher.prediction]:.2f} and {errors[instead]:.2f}; mend its config"
        )
    both = errors[teacher.prediction], unprompted[teacher.prediction]
    if (fault := unfit(*both, section.max_relative_error)) is not None:
        raise teacher.wrong(fault)
    phases.say(
        "the teacher's relative error on the data, at equal signal and noise, with prompts and without: "
        f"{both[0]:.2f}, {both[1]:.2f}"
    )


def _imitate(phases: Phases, section: FinetuneSection, teacher: PipelineFolder) -> None:
    """Train a copy of the folder's network to give the v that its own output means."""
    if phases.stands(phases.folder.teacher):
        return
    frozen, own = phases.processes.frozen(load_network(teacher)), NoiseSchedule(teacher.schedule)
    native = NativeTeacher.of(frozen, teacher.prediction, own, phases.schedule, phases.device)

    def loss(network: nn.Module, draws: Draws, update: int, batch: int) -> RowLoss:
        rows = phases.noisy(draws, update, batch, late_share=section.late_share)
        dropped = draws.uniform(update, batch, Draw.DROPOUT) < section.condition_dropout
        return RowLoss(imitation_loss(network, native, rows, dropped.to(phases.device)))

    phases.train("v_finetune", section, lambda: load_network(teacher), loss, phases.folder.teacher)


def learn(
    phases: Phases,
    name: str,
    section: TeacherSection,
    start: Callable[[], nn.Module],
    folder: Path,
    save: Save | None = None,
) -> None:
    """Train v-prediction on the data; the condition is dropped on a share of the rows. save: see Phases.train."""

    def loss(network: nn.Module, draws: Draws, update: int, batch: int) -> RowLoss:
        rows = phases.noisy(draws, update, batch, late_share=section.late_share)
        dropped = draws.uniform(update, batch, Draw.DROPOUT) < section.condition_dropout
        return RowLoss(teacher_loss(network, phases.tables, rows, dropped.to(phases.device)))

    phases.train(name, section, start, loss, folder, save=save)


def train_stage_one(phases: Phases) -> None:
    """The w-conditioned student of the guided teacher, and its gate. Raises: DivergedError when it is missed."""
    section, folder = phases.recipe.stage_one, phases.folder
    if known := phases.processes.first(lambda: _known_errors(folder.gate)):
        _judge(phases, known)
        return
    teacher = phases.frozen(folder.teacher)

    def loss(network: nn.Module, draws: Draws, update: int, batch: int) -> RowLoss:
        rows = phases.noisy(draws, update, batch, late_share=section.late_share)
        w = phases.weights(draws, update, batch, section.unguided_share)
        losses = stage_one_loss(network, teacher, phases.tables, rows, w)
        return RowLoss(balanced(losses, phases.tables.applied(w, rows.t), section.w_power), w)

    phases.train("stage_one", section, lambda: student_of(load_stock(folder.teacher)), loss, folder.stage_one)
    _gate(phases, teacher)


def _gate(phases: Phases, teacher: nn.Module) -> None:
    """Refuse a stage-one student that is not yet the guided teacher: every halving inherits its error."""
    found = guidance_errors(phases, phases.frozen(phases.folder.stage_one), teacher)
    errors = phases.processes.first(lambda: found)
    shown = ", ".join(f"{scale:g}: {error:.4f}" for scale, error in errors.items())
    phases.say(f"stage one, relative v-error by guidance_scale: {shown}")
    _judge(phases, errors)
    passed = json.dumps({"relative_v_error": {f"{scale:g}": error for scale, error in errors.items()}})
    phases.processes.first(lambda: write_text(phases.folder.gate, passed + "\n"))


def _judge(phases: Phases, errors: dict[float, float]) -> None:
    """Raises: DivergedError when the largest error, by guidance_scale, is more than the recipe allows."""
    section, worst = (
        phases.recipe.stage_one,
        max(errors, key=lambda scale: (math.isnan(errors[scale]), errors[scale])),
    )
    if not errors[worst] <= section.max_relative_error:
        raise DivergedError(
            f"stage one misses its gate: relative v-error {errors[worst]:.4f} at guidance_scale {worst:g}, allowed "
            f"{section.max_relative_error:g}; train it longer in a new folder, which takes this one's teacher "
            f"(--out NEW --from {phases.folder.path} --set stage_one.updates={2 * section.updates}), or go on with "
            f"it as it is (--resume --set {GATE_LIMIT}=LIMIT)"
        )


def _known_errors(gate: Path) -> dict[float, float] | None:
    """What a gate that was passed had found."""
    if not gate.is_file():
        return None
    errors = json.loads(gate.read_text(encoding="utf-8"))["relative_v_error"]
    return {float(scale): error for scale, error in errors.items()}


@torch.inference_mode()
def guidance_errors(phases: Phases, student: nn.Module, teacher: nn.Module) -> dict[float, float]:
    """|v_student - v_guided|² / |v_guided|² on the same rows, by guidance_scale.

    Every process computes all rows, no more of them at a time than it trains on, whatever their split.
    """
    section, allowed = phases.recipe.stage_one, phases.recipe.guidance
    seen = min(GATE_ROWS, GATE_BATCHES * section.batch_size)
    batch = min(seen, section.batch_size)
    parts = equal_parts(batch, phases.processes.count * section.accumulate)
    draws, size = Draws(phases.recipe.seed, "gate"), batch // parts
    sums = {scale: torch.zeros(2) for scale in torch.linspace(allowed.min, allowed.max, GATE_SCALES).tolist()}
    for update, k in product(range(seen // batch), range(parts)):
        rows = phases.noisy(draws.share(k, parts), update, size)
        z_t, _ = phases.tables.noisy(rows)
        both = both_ways(teacher, z_t, rows)
        for scale, of_scale in sums.items():
            w = torch.full((size,), weight_from_scale(scale), device=phases.device)
            target = guided(both, phases.tables.applied(w, rows.t))
            error = predict(student, z_t, rows.t, rows.condition, w, rows.extra) - target
            of_scale.add_(torch.stack([error.square().sum(), target.square().sum()]).cpu())
    return {scale: float(error / norm) for scale, (error, norm) in sums.items()}


def equal_parts(rows: int, least: int) -> int:
    """The fewest equal parts of ``rows``, ``least`` at least where there are so many rows."""
    return next((parts for parts in range(least, rows) if rows % parts == 0), rows)
