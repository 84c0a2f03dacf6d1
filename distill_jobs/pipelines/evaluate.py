"""Quality of a latent run: teacher and students from the same noise and prompts, compared in latents."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from distill_jobs.contenders import Contender, contenders
from distill_jobs.curves import write_curves
from distill_jobs.data.latents import LatentSource
from distill_jobs.data.masked_latents import MaskedLatentSource
from distill_jobs.data.open import latents_of, open_source
from distill_jobs.data.source import Condition, Source
from distill_jobs.draws import Draws
from distill_jobs.errors import RecipeError
from distill_jobs.features import local_space
from distill_jobs.gates import Gate
from distill_jobs.pipelines.checks import open_folder
from distill_jobs.pipelines.decoders import DECODER, decoded, decoder_gates, measure_decoders
from distill_jobs.pipelines.drawing import LatentSampler
from distill_jobs.pipelines.encoders import Encoders
from distill_jobs.pipelines.folder import PipelineFolder
from distill_jobs.pipelines.glyph_table import glyph_judge, glyph_table
from distill_jobs.pipelines.glyphs import GLYPHS, GlyphJudge, glyph_gates, measure_glyphs
from distill_jobs.pipelines.inpainting import (
    INSIDE,
    LATENT_INPAINTING,
    Scene,
    latent_painters,
    measure_latent_inpainting,
)
from distill_jobs.pipelines.inversion import LATENT_INVERSION, measure_latent_inversion
from distill_jobs.pipelines.kept import KeptDraws, Networks
from distill_jobs.pipelines.packing import whole_image
from distill_jobs.pipelines.pictures import PictureJudge
from distill_jobs.pipelines.report import DISTANCE, LatentReport, distance_gates, fresh_gates
from distill_jobs.pipelines.tiny_decoder import load_decoder
from distill_jobs.pipelines.vae import Autoencoder
from distill_jobs.processes import Processes
from distill_jobs.recipe import Recipe
from distill_jobs.run_folder import RunFolder
from distill_jobs.sections import ComputeSection
from distill_jobs.tasks import inversion_gates, weights_of
from engines.manifest import Evaluation, EvaluationRow

METRIC = "none: latents are compared with the teacher's, at equal noise"


@dataclass(frozen=True)
class Sitting:
    """What networks of a latent run are asked, and who judges.

    captioned: asked with captions of the data; named: with the prompts of ``glyphs``, where there is a glyph table;
    encoders: of a run with pictures to look at, None for others; judge: where the recipe names features.
    """

    source: Source
    captioned: LatentSampler
    named: LatentSampler
    glyphs: GlyphJudge | None
    encoders: Encoders | None
    judge: PictureJudge | None

    @classmethod
    def of(cls, run_dir: Path, recipe: Recipe, progress: Progress, lenders: Sequence[Path] = ()) -> Sitting:
        """Of a run whose teacher is finished. Raises: JobError; DataError."""
        folder, processes = RunFolder(run_dir), Processes(ComputeSection(), run_dir)
        teacher = open_folder(folder.teacher)
        source = open_source(recipe, teacher, processes, progress)
        latents = latents_of(source)
        if latents is not None and folder.data.is_file():  # tables are of the data that the run was started with
            folder.keep_data(folder.data, latents.cache.identity, len(latents.cache))
        captioned = LatentSampler(
            recipe,
            Networks(processes.device),
            KeptDraws(folder.evaluation, tuple(RunFolder(lender).evaluation for lender in lenders)),
            prompts=_prompts(_unmasked(source), recipe, teacher.size_px),
            null=source.null(1),
            blank=source.blank() if isinstance(source, MaskedLatentSource) else None,
        )
        glyphs = glyph_judge(run_dir, recipe, processes, progress, lenders)
        encoders = None if glyphs is None and recipe.decoder is None else Encoders.load(teacher, processes.device)
        named = captioned
        if glyphs is not None and encoders is not None:
            named = replace(captioned, prompts=encoders.prompts.encode(glyphs.asking.prompts).to("cpu"))
        judge = _judge(_unmasked(source), recipe, teacher, processes.device)
        return cls(source, captioned, named, glyphs, encoders, judge)

    @property
    def asked(self) -> LatentSampler:
        """Whom the table of quality is of: captions have pictures to be judged by, names may have a glyph table."""
        return self.named if self.judge is None else self.captioned


def evaluate_latent_run(
    run_dir: Path, recipe: Recipe, *, progress: Progress, command: str = "", lenders: Sequence[Path] = ()
) -> LatentReport:
    """Measure a finished run, write report.json and report.md into it.

    Prompts are captions of the data, or those of the glyph table where there is one; a device other than the CPU is
    used where there is one. Networks that see masks draw whole images for the table of quality, and have a table of
    inpainting. What is drawn is kept: an interrupted evaluation goes on. lenders: other run folders, from which
    latents of equal networks, prompts and seeds are taken.
    Raises: JobError when a network is missing or gives no numbers; DataError.
    """
    started, everyone = time.monotonic(), contenders(run_dir, recipe)
    sitting = Sitting.of(run_dir, recipe, progress, lenders)
    rows = _quality(sitting.asked, everyone, sitting.judge, progress)
    tasks = _tasks(run_dir, sitting.captioned, sitting.source, everyone, progress)
    tasks |= _pictures(run_dir, sitting, everyone, progress)
    if lenders:
        taken = len(sitting.captioned.kept.lent)
        progress.console.print(f"Taken from other runs: {taken} of the latents that networks drew")
    samples, settings = len(sitting.asked.prompts), recipe.evaluation
    report = LatentReport.made(
        run_dir,
        recipe,
        command=command,
        weights=weights_of(run_dir, recipe, everyone),
        features="" if sitting.judge is None else sitting.judge.space.identity,
        seconds=time.monotonic() - started,
        evaluation=Evaluation(metric=_metric(sitting.judge), samples=samples, seeds=settings.seeds, rows=rows),
        tasks=tasks,
        gates=_gates(recipe, rows, tasks),
    )
    write_curves(run_dir, rows, settings.teacher_steps)
    report.write(run_dir)
    return report


def _gates(
    recipe: Recipe, rows: Sequence[EvaluationRow], tasks: Mapping[str, Sequence[EvaluationRow]]
) -> tuple[Gate, ...]:
    glyphs, decoder = tasks.get(GLYPHS, ()), "teacher" if recipe.decoder is None else recipe.decoder.target
    return (
        *distance_gates(rows),
        *fresh_gates(rows, tasks.get(GLYPHS, rows)),
        *distance_gates(tasks.get(LATENT_INPAINTING, ()), INSIDE),
        *inversion_gates(tasks.get(LATENT_INVERSION, ())),
        *glyph_gates(glyphs, recipe.served.default, recipe.evaluation.teacher_steps),
        *decoder_gates(tasks.get(DECODER, ()), decoder),
    )


def measure_latent_teachers(
    run_dir: Path, recipe: Recipe, teachers: Sequence[Contender], progress: Progress, lenders: Sequence[Path] = ()
) -> Evaluation:
    """Rows of the glyph table, or of the table of quality, the first teacher's first; no student has to stand.

    Raises: JobError when nobody judges pictures; DataError.
    """
    sitting, settings = Sitting.of(run_dir, recipe, progress, lenders), recipe.evaluation
    if sitting.glyphs is None or sitting.encoders is None:
        if sitting.judge is None:
            raise RecipeError(
                "evaluation.features: nobody judges pictures of this run, so no teacher can be told from another; "
                "evaluate with features: inception or clip"
            )
        rows, metric = _quality(sitting.asked, teachers, sitting.judge, progress), _metric(sitting.judge)
        return Evaluation(metric=metric, samples=len(sitting.asked.prompts), seeds=settings.seeds, rows=rows)
    decoder, device = sitting.encoders.autoencoder, sitting.named.device
    each = len(teachers[0].scales_of(settings)) * len(settings.seeds)
    task = progress.add_task(GLYPHS, total=len(teachers) * each, loss="")
    rows = measure_glyphs(
        sitting.named,
        teachers,
        sitting.glyphs,
        lambda latents: decoded(decoder, latents, device, settings.batch_size),
        lambda *_: None,
        lambda: progress.advance(task),
    )
    metric, samples = "in the features of the image encoder of the glyphs", len(sitting.named.prompts)
    return Evaluation(metric=metric, samples=samples, seeds=settings.seeds, rows=rows)


def _judge(
    source: LatentSource, recipe: Recipe, teacher: PipelineFolder, device: torch.device
) -> PictureJudge | None:
    """Who measures the pictures of the prompts, where the recipe names features."""
    settings, draws = recipe.evaluation, _draws(recipe)
    if settings.features_path is None:
        return None
    space = local_space(settings.features, Path(settings.features_path))
    asked = [(draws, update, settings.batch_size) for update in range(-(-settings.samples // settings.batch_size))]
    batches = ((source.pixels(*each), source.captions(*each)) for each in asked)
    autoencoder = Autoencoder.load(teacher).to(device)

    def decode(latents: Tensor) -> Tensor:
        return decoded(autoencoder, latents, device, settings.batch_size)

    return PictureJudge.of(space, settings.samples, batches, decode)


def _metric(judge: PictureJudge | None) -> str:
    return METRIC if judge is None else f"{judge.space.metric}, to the data's images of the same captions"


def _quality(
    sampler: LatentSampler, everyone: Sequence[Contender], judge: PictureJudge | None, progress: Progress
) -> tuple[EvaluationRow, ...]:
    """A row for each contender and guidance scale; the first contender is the reference."""
    settings = sampler.recipe.evaluation
    reference: dict[tuple[float, int], Tensor] = {}
    rows, each = [], len(settings.seeds)
    cells = each * sum(len(contender.scales_of(settings)) for contender in everyone)
    task = progress.add_task("evaluate", total=cells, loss="")
    for contender in everyone:
        for scale in contender.scales_of(settings):
            found: dict[str, list[float]] = {}
            for seed in settings.seeds:
                drawn = sampler.draw(contender, scale, seed)
                wanted = reference.setdefault((scale, seed), drawn)
                measured = {} if judge is None else judge.measure(drawn)
                measured[DISTANCE] = float((drawn - wanted).square().mean().sqrt())
                for name, value in measured.items():
                    found.setdefault(name, []).append(value)
                progress.advance(task)
            rows.append(contender.row(scale, found))
    return tuple(rows)


def _tasks(
    run_dir: Path, sampler: LatentSampler, source: Source, everyone: Sequence[Contender], progress: Progress
) -> dict[str, tuple[EvaluationRow, ...]]:
    """The tables of what networks do besides drawing from text."""
    recipe, tables = sampler.recipe, dict[str, tuple[EvaluationRow, ...]]()
    settings, draws = recipe.evaluation, _draws(recipe)
    if isinstance(source, MaskedLatentSource):
        painters = latent_painters(everyone)
        scene = Scene.of(source, draws, settings.samples, settings.batch_size)
        painted = progress.add_task("inpainting", total=len(painters) * len(settings.seeds), loss="")
        tables[LATENT_INPAINTING] = measure_latent_inpainting(
            sampler, painters, scene, lambda: progress.advance(painted)
        )
    if recipe.encoder is not None:
        known = _latents(_unmasked(source), recipe)
        inverted = progress.add_task("inversion", total=2 * len(recipe.encoder.students), loss="")
        tables[LATENT_INVERSION] = measure_latent_inversion(
            run_dir, sampler, known, lambda: progress.advance(inverted)
        )
    return tables


def _pictures(
    run_dir: Path, sitting: Sitting, everyone: Sequence[Contender], progress: Progress
) -> dict[str, tuple[EvaluationRow, ...]]:
    """The tables of what decoded latents look like: of glyphs, asked for by name, and of a tiny decoder."""
    recipe, tables = sitting.named.recipe, dict[str, tuple[EvaluationRow, ...]]()
    encoders, judge, sampler = sitting.encoders, sitting.glyphs, sitting.named
    if encoders is None:
        return tables
    if judge is not None:
        tables[GLYPHS] = glyph_table(run_dir, judge, sampler, everyone, encoders.autoencoder, progress)
    if recipe.decoder is not None:
        tiny, source = load_decoder(RunFolder(run_dir).decoder).to(sampler.device), _unmasked(sitting.source)
        judged = None if judge is None else judge.measure
        known = _originals(source, recipe), _latents(source, recipe)
        tables[DECODER] = measure_decoders(sampler, everyone, encoders.autoencoder, tiny, known, judged)
    return tables


def _unmasked(source: Source) -> LatentSource:
    found = latents_of(source)
    assert found is not None  # captioned images have no other
    return found


def _latents(source: LatentSource, recipe: Recipe) -> Tensor:
    """(samples, C, h, w) of the images whose captions are the prompts."""
    return _whole(partial(source.means, _draws(recipe)), recipe)


def _originals(source: LatentSource, recipe: Recipe) -> Tensor:
    """(samples, 3, H, W) those images."""
    return _whole(partial(source.pixels, _draws(recipe)), recipe)


def _whole(batch: Callable[[int, int], Tensor], recipe: Recipe) -> Tensor:
    """As many rows as the evaluation has samples. batch: of an update and a size."""
    samples, size = recipe.evaluation.samples, recipe.evaluation.batch_size
    return torch.cat([batch(update, size) for update in range(-(-samples // size))])[:samples]


def _prompts(source: LatentSource, recipe: Recipe, side_px: int) -> Condition:
    """Conditions of captions, framed as whole images."""
    samples, size = recipe.evaluation.samples, recipe.evaluation.batch_size
    batches = [source.batch(_draws(recipe), update, size).condition for update in range(-(-samples // size))]
    told = Condition.cat(batches)[:samples]
    if told.time_ids is None:
        return told
    return Condition(told.tokens, told.pooled, whole_image(side_px).expand(samples, 6))


def _draws(recipe: Recipe) -> Draws:
    """Which rows of the data, so that an image has its own caption."""
    return Draws(recipe.seed, "evaluation")
