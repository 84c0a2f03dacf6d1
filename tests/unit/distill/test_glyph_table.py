"""Whether pictures show what was asked for: right ones are counted, wrong ones are not, and the encoder learns."""

from pathlib import Path

import numpy as np
import pytest
import torch
from rich.progress import Progress
from torch import Tensor, nn

from distill_jobs import glyph_encoder as module
from distill_jobs.contenders import CONSISTENCY, STUDENT, TEACHER
from distill_jobs.data.scenes import Held, Scenes
from distill_jobs.gates import FRECHET
from distill_jobs.glyph_encoder import GlyphEncoder, as_tensor, glyph_encoder
from distill_jobs.loop import Trainer
from distill_jobs.pipelines import glyphs as table
from distill_jobs.pipelines.glyphs import Asking, GlyphJudge, glyph_gates
from distill_jobs.pipelines.sheet import contact_sheet
from distill_jobs.processes import Processes
from distill_jobs.sections import ComputeSection
from distill_jobs.signals import StopSignal
from distill_jobs.task_tables import task_lines
from engines.manifest import EvaluationRow, Measured
from tests.support.glyphs import glyphs

SIDE = 64


class Shapes(nn.Module):
    """An encoder that sees what is not white, at any size, in any colour."""

    def features(self, pictures: Tensor) -> Tensor:
        found = []
        for drawn in (pictures.amin(dim=1) < 0.5).float():
            rows, columns = drawn.amax(1).nonzero(), drawn.amax(0).nonzero()
            cut = drawn[int(rows.min()) : int(rows.max()) + 1, int(columns.min()) : int(columns.max()) + 1]
            found.append(nn.functional.interpolate(cut[None, None], (20, 20), mode="area").flatten())
        centred = torch.stack(found) - 0.5
        return nn.functional.normalize(centred)


@pytest.fixture
def scenes() -> Scenes:
    return Scenes(glyphs(12), Held(0, glyphs=0.1, compositions=0.3), SIDE)


@pytest.fixture
def judge(scenes: Scenes, monkeypatch: pytest.MonkeyPatch) -> GlyphJudge:
    monkeypatch.setattr(table, "COMPOSITIONS", 10)
    encoder: GlyphEncoder = Shapes()  # type: ignore[assignment]
    return GlyphJudge(Asking.of(scenes, 20), scenes, encoder)


def drawn(judge: GlyphJudge, scenes: Scenes) -> Tensor:
    """What every prompt asks for."""
    return as_tensor(judge.asking.drawn(scenes, 0))


def test_prompts_are_names_twice_and_held_out_compositions(judge: GlyphJudge, scenes: Scenes) -> None:
    asking, held = judge.asking, scenes.held
    assert [asked.names for asked in asking.twins[::2]] == [asked.names for asked in asking.twins[1::2]]
    assert len({asked.names for asked in asking.twins}) == 10
    assert len(asking.recoloured) == len(asking.pairs) == 10
    assert all(held.composition(str(asked.colour), *asked.names) for asked in asking.recoloured)
    assert all(held.composition(*asked.names) for asked in asking.pairs)
    assert not any(held.glyph(name) for asked in asking.twins for name in asked.names)
    shown = [asking.prompts[i] for i in asking.shown]
    assert len(shown) == len(set(shown)) == 30


def test_pictures_of_what_was_asked_for_agree(judge: GlyphJudge, scenes: Scenes) -> None:
    found = judge.measure(drawn(judge, scenes))
    measures = (table.TOP_1, table.TOP_5, table.RECOLOURED, table.PAIRED)
    assert [found[name] for name in measures] == [1, 1, 1, 1]
    assert found[FRECHET] < 0.05


def test_the_row_of_the_data_says_what_right_pictures_are_worth(judge: GlyphJudge) -> None:
    row = judge.ceiling()
    assert (row.model, row.steps, row.evaluations) == ("data", 0, 0)
    assert [row.metrics[name].mean for name in (table.TOP_1, table.RECOLOURED, table.PAIRED)] == [1, 1, 1]
    shown = next(line for line in task_lines({"glyphs": (row,)}) if "| data |" in line)
    assert shown.startswith("| – | data | – | – | 1.000 |")


def test_pictures_of_something_else_do_not(judge: GlyphJudge, scenes: Scenes) -> None:
    right = drawn(judge, scenes)
    found = judge.measure(right.roll(2, dims=0))
    assert found[table.TOP_1] == 0
    assert found[table.RECOLOURED] <= 0.1
    assert found[table.PAIRED] < 0.5
    grey = right.mean(dim=1, keepdim=True).expand_as(right)
    assert judge.measure(grey)[table.RECOLOURED] == 0
    mirrored = right.flip(-1)
    assert judge.measure(mirrored)[table.PAIRED] < 0.5


def test_diversity_is_the_distance_of_twins(judge: GlyphJudge, scenes: Scenes) -> None:
    right = drawn(judge, scenes)
    same = right.clone()
    same[1:20:2] = same[0:20:2]
    assert judge.measure(same)[table.DIVERSITY] == pytest.approx(0, abs=1e-5)
    assert judge.measure(right.roll(1, dims=0))[table.DIVERSITY] > 0.3


def test_the_encoder_learns_to_tell_glyphs_apart_and_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = module.TRAINING.model_copy(update={"updates": 60, "batch_size": 16, "warmup": 5, "ema": 0.8})
    monkeypatch.setattr(module, "TRAINING", few)
    scenes = Scenes(glyphs(4), Held(0, 0, 0), 32)
    quiet, processes = Progress(disable=True), Processes(ComputeSection(), tmp_path)
    trainer = Trainer(processes, tmp_path / "checkpoints", 100, 100, StopSignal(), quiet)
    encoder = glyph_encoder(tmp_path / "encoder", scenes, trainer)
    rng = np.random.default_rng(1)
    fresh = as_tensor([scenes.single(glyph, rng).picture for glyph in scenes.seen for _ in range(10)])
    told = encoder(fresh).argmax(dim=1)
    assert float((told == torch.arange(4).repeat_interleave(10)).float().mean()) > 0.7
    monkeypatch.setattr(Trainer, "train", lambda *_: pytest.fail("it trained again"))
    again = glyph_encoder(tmp_path / "encoder", scenes, trainer)
    torch.testing.assert_close(again.features(fresh), encoder.features(fresh))


def test_gates_compare_with_the_finest_teacher() -> None:
    def row(model: str, steps: int, top_1: float, frechet: float) -> EvaluationRow:
        values = dict.fromkeys((table.TOP_1, table.TOP_5, table.RECOLOURED, table.PAIRED), top_1)
        measured = {name: Measured.of([value]) for name, value in {**values, FRECHET: frechet}.items()}
        return EvaluationRow(model=model, steps=steps, evaluations=steps, guidance_scale=4.0, metrics=measured)

    finish = row(CONSISTENCY, 4, 0.7, 1.3)
    rows = [row(TEACHER, 50, 0.9, 1.0), row(STUDENT, 4, 0.85, 1.1), row(STUDENT, 1, 0.5, 2.5), finish]
    verdicts = {gate.name: gate.passed for gate in glyph_gates(rows, 4.0, 50)}
    assert verdicts["4 steps, guidance 4: nearest glyph is the prompted one"]
    assert not verdicts["4 steps, guidance 4: prompted glyph among the nearest five"]
    assert not verdicts["4 steps, guidance 4: nearest glyph / teacher's best"]
    assert verdicts["4-step Fréchet distance / teacher's, guidance 4"]
    assert not verdicts["1-step Fréchet distance / teacher's, guidance 4"]
    assert not verdicts["4 steps of consistency, guidance 4: nearest glyph is the prompted one"]
    assert not verdicts["4-step consistency Fréchet distance / teacher's, guidance 4"]
    assert not list(glyph_gates((), 4.0, 50))


def test_a_sheet_has_a_cell_for_every_picture() -> None:
    rows = torch.ones(5, 3, 8, 8).split(3)
    assert contact_sheet(rows).size == (3 * 12, 2 * 12)
