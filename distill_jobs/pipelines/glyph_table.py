"""The glyph table of a run: its encoder, its prompts, its pictures, and sheets of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from distill_jobs.contenders import Contender
from distill_jobs.data.drawing import scenes_of
from distill_jobs.glyph_encoder import glyph_encoder
from distill_jobs.latent_sections import GlyphData
from distill_jobs.loop import Trainer
from distill_jobs.pipelines.checks import open_folder
from distill_jobs.pipelines.drawing import LatentSampler
from distill_jobs.pipelines.encoders import Encoders
from distill_jobs.pipelines.glyphs import GLYPHS, Asking, GlyphJudge, measure_glyphs
from distill_jobs.pipelines.sheet import contact_sheet, prompt_sheet
from distill_jobs.processes import Processes
from distill_jobs.recipe import Recipe
from distill_jobs.run_folder import RunFolder
from distill_jobs.signals import StopSignal
from engines.manifest import EvaluationRow

SHOWN_STEPS = (4, 1)
COLUMNS = 8
DECODED_ROWS = 64


def glyph_table(
    run_dir: Path,
    recipe: Recipe,
    processes: Processes,
    sampler: LatentSampler,
    everyone: Sequence[Contender],
    progress: Progress,
) -> tuple[EvaluationRow, ...]:
    """Train the encoder where it does not stand, draw and measure, and write sheets/glyphs-CONTENDER.png.

    glyphs.txt beside them has the prompts, row by row; glyphs.png shows prompts with what the teacher and the
    students of 4 steps and 1 step make of them.

    Raises: DataError; Interrupted after a signal while the encoder trains.
    """
    data, folder, settings = recipe.data, RunFolder(run_dir), recipe.evaluation
    if not isinstance(data, GlyphData):
        raise TypeError("only a run on glyphs has a glyph table")
    scenes = scenes_of(data, recipe.seed)
    with StopSignal().listening() as stop:
        every, log_every = recipe.checkpoint_every, recipe.log_every
        trainer = Trainer(processes, run_dir / "checkpoints", every, log_every, stop, progress)
        encoder = glyph_encoder(folder.glyph_encoder, scenes, trainer)
    judge = GlyphJudge(Asking.of(scenes, settings.samples), scenes, encoder)
    encoders = Encoders.load(open_folder(folder.teacher), processes.device)
    sheets = run_dir / "sheets"
    sheets.mkdir(exist_ok=True)
    prompts, shown = judge.asking.prompts, judge.asking.shown
    (sheets / "glyphs.txt").write_text("".join(f"{prompts[i]}\n" for i in shown), encoding="utf-8")

    @torch.inference_mode()
    def decode(latents: Tensor) -> Tensor:
        parts = torch.split(latents, DECODED_ROWS)
        return torch.cat([encoders.autoencoder.decode(part.to(processes.device)).cpu() for part in parts])

    together: dict[str, Tensor] = {}

    def show(contender: Contender, pictures: Tensor) -> None:
        contact_sheet(torch.split(pictures[shown], COLUMNS)).save(sheets / f"glyphs-{contender.key}.png")
        if contender == everyone[0] or (contender.exported and contender.steps in SHOWN_STEPS):
            steps = f"{contender.steps} step{'s' if contender.steps > 1 else ''}"
            together[f"{contender.title}, {steps}"] = pictures[shown]

    told = replace(sampler, prompts=encoders.prompts.encode(prompts).to("cpu"))
    each = len(settings.guidance_scales) * len(settings.seeds)
    task = progress.add_task(GLYPHS, total=len(everyone) * each, loss="")
    rows = measure_glyphs(told, everyone, judge, decode, show, lambda: progress.advance(task))
    if together:
        asked = [prompts[i] for i in shown]
        prompt_sheet(asked, list(together), list(together.values())).save(folder.sample_sheet)
    return rows
