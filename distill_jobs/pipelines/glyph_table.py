"""The glyph table of a run: its encoder, its prompts, its pictures, and sheets of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from distill_jobs.contenders import Contender
from distill_jobs.data.drawing import scenes_of
from distill_jobs.glyph_encoder import glyph_encoder
from distill_jobs.latent_sections import GlyphData
from distill_jobs.loop import Trainer
from distill_jobs.phases import stands
from distill_jobs.pipelines.decoders import decoded
from distill_jobs.pipelines.drawing import LatentSampler
from distill_jobs.pipelines.glyphs import GLYPHS, Asking, GlyphJudge, measure_glyphs
from distill_jobs.pipelines.sheet import contact_sheet, prompt_sheet
from distill_jobs.pipelines.tiny_decoder import Decoder
from distill_jobs.processes import Processes
from distill_jobs.recipe import Recipe
from distill_jobs.run_folder import RunFolder, stored_recipe
from distill_jobs.signals import StopSignal
from distill_jobs.taken import copy_phase
from engines.manifest import EvaluationRow

SHOWN_STEPS = (4, 1)
COLUMNS = 8


def glyph_judge(
    run_dir: Path, recipe: Recipe, processes: Processes, progress: Progress, lenders: Sequence[Path] = ()
) -> GlyphJudge | None:
    """Who measures pictures of glyphs; None for runs on others.

    Its encoder is trained where it does not stand, unless one of the lending runs has it of the same glyphs.
    Raises: DataError; Interrupted after a signal while the encoder trains.
    """
    data = recipe.data
    if not isinstance(data, GlyphData):
        return None
    scenes, folder = scenes_of(data, recipe.seed), RunFolder(run_dir).glyph_encoder
    if not stands(folder, processes):
        processes.first(lambda: _lend(folder, recipe, lenders, progress))
    with StopSignal().listening() as stop:
        every, log_every = recipe.checkpoint_every, recipe.log_every
        trainer = Trainer(processes, run_dir / "checkpoints", every, log_every, stop, progress)
        encoder = glyph_encoder(folder, scenes, trainer)
    return GlyphJudge(Asking.of(scenes, recipe.evaluation.samples), scenes, encoder)


TOLD_APART = {"kind", "font", "names", "side_px", "held_glyphs", "held_compositions"}
"""What of the data its encoder sees: the glyphs themselves, whatever pictures a run is taught."""


def _lend(folder: Path, recipe: Recipe, lenders: Sequence[Path], progress: Progress) -> None:
    """Take the encoder of the first that has it of the same glyphs, and say of the others why not."""
    for lender in map(RunFolder, lenders):
        if not lender.glyph_encoder.is_dir():
            continue
        theirs = stored_recipe(lender)
        seen = [(r.seed, r.data.model_dump(include=TOLD_APART)) for r in (theirs, recipe) if r.data != "digits"]
        if seen[0] == seen[-1] and len(seen) == 2:
            copy_phase(lender.glyph_encoder, folder)
            return
        progress.console.log(f"glyph encoder: not taken from {lender.path}, which is of other glyphs or seed")


def glyph_table(
    run_dir: Path,
    judge: GlyphJudge,
    sampler: LatentSampler,
    everyone: Sequence[Contender],
    decoder: Decoder,
    progress: Progress,
) -> tuple[EvaluationRow, ...]:
    """Draw and measure, and write sheets/glyphs-CONTENDER.png. sampler: with the judge's prompts.

    glyphs.txt beside them has the prompts, row by row; glyphs.png shows prompts with what the teacher and the
    students of 4 steps and 1 step make of them.
    """
    folder, settings = RunFolder(run_dir), sampler.recipe.evaluation
    sheets = run_dir / "sheets"
    sheets.mkdir(exist_ok=True)
    prompts, shown = judge.asking.prompts, judge.asking.shown
    (sheets / "glyphs.txt").write_text("".join(f"{prompts[i]}\n" for i in shown), encoding="utf-8")
    together: dict[str, Tensor] = {}

    def decode(latents: Tensor) -> Tensor:
        return decoded(decoder, latents, sampler.device, settings.batch_size)

    def show(contender: Contender, pictures: Tensor) -> None:
        contact_sheet(torch.split(pictures[shown], COLUMNS)).save(sheets / f"glyphs-{contender.key}.png")
        if contender == everyone[0] or (contender.exported and contender.steps in SHOWN_STEPS):
            steps = f"{contender.steps} step{'s' if contender.steps > 1 else ''}"
            together[f"{contender.title}, {steps}"] = pictures[shown]

    each = len(settings.guidance_scales) * len(settings.seeds)
    task = progress.add_task(GLYPHS, total=len(everyone) * each, loss="")
    rows = measure_glyphs(sampler, everyone, judge, decode, show, lambda: progress.advance(task))
    if together:
        asked = [prompts[i] for i in shown]
        prompt_sheet(asked, list(together), list(together.values())).save(folder.sample_sheet)
    return rows
