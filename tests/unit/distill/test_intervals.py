"""Where to guide a teacher: the command that measures it guided in several intervals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.progress import Progress
from typer.testing import CliRunner

from distill_jobs.cli import app
from distill_jobs.contenders import Contender
from distill_jobs.intervals import JSON_NAME, MARKDOWN_NAME, IntervalReport
from distill_jobs.job import run_job
from distill_jobs.recipe_file import read_recipe
from distill_jobs.run_folder import RunFolder
from tests.support.tiny_recipe import OVERRIDES


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which nothing but the teacher is left, as of one that was stopped there."""
    out = tmp_path_factory.mktemp("intervals") / "run"
    run_job(read_recipe("digits", OVERRIDES), out, resume=False, progress=Progress(disable=True))
    for later in ("stage_one", "students"):
        shutil.rmtree(out / later)
    return out


def called(run: Path, *told: str) -> str:
    result = CliRunner().invoke(app, ["intervals", str(run), *told])
    assert result.exit_code == 0, result.stderr
    return result.stdout + result.stderr


def test_a_teacher_is_measured_in_every_interval_at_every_guidance_above_1(run: Path) -> None:
    """By hand: of 8 steps at 124, 249, … 999, log-SNRs 3.23, 1.76, 0.81, 0, -0.81, -1.76, -3.23 and none."""
    told = ("--log-snr-min", "-2", "--log-snr-min", "-1", "--log-snr-max", "0.5", "--steps", "8")
    assert f"{run.name}/{MARKDOWN_NAME}" in called(run, *told).replace("\n", "")
    report = IntervalReport.model_validate_json((run / JSON_NAME).read_bytes())
    names = ["guided everywhere", "guided from log-SNR -2 to 0.5", "guided from log-SNR -1 to 0.5"]
    assert [(row.model, row.guidance_scale, row.evaluations) for row in report.rows] == [
        (name, 4.0, evaluations) for name, evaluations in zip(names, (16, 11, 10), strict=True)
    ]
    everywhere, *others = (row.metrics["paired_distance"].mean for row in report.rows)
    assert everywhere == 0
    assert (report.samples, report.seeds) == (20, (1, 2))
    assert len(report.teacher_sha256) == 64
    assert all(distance > 0 for distance in others)
    page = (run / MARKDOWN_NAME).read_text(encoding="utf-8")
    assert report.metric in page
    assert all(name in page for name in names)
    assert f"python -m distill_jobs intervals {run} {' '.join(told)}" in page


def test_what_was_drawn_for_an_interval_is_not_drawn_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called(run, "--log-snr-max", "1", "--steps", "4")
    first, drawn = json.loads((run / JSON_NAME).read_text()), list[str]()
    monkeypatch.setattr(Contender, "draw", lambda self, *_: drawn.append(self.key))
    called(run, "--log-snr-max", "1", "--steps", "4")
    assert json.loads((run / JSON_NAME).read_text()) == first
    assert not drawn


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ((), "give a bound to try, with --log-snr-min or --log-snr-max"),
        (("--log-snr-min", "-2", "--log-snr-min", "1", "--log-snr-max", "0.5"), "is not in 1 and 0.5;"),
        (("--log-snr-min", "3", "--log-snr-max", "3.1"), "no timestep is between guidance.log_snr_min and"),
        (("--log-snr-max", "1", "--steps", "1001"), "--steps 1001: the schedule has 1000 timesteps"),
        (("--log-snr-min", "-40", "--log-snr-max", "-3", "--steps", "2"), "of 2 steps none is guided from log-SNR"),
        (("--log-snr-min", "nan"), "guidance.log_snr_min"),
        (("--log-snr-max", "1", "--from", "nowhere"), "nowhere is not a run folder"),
    ],
)
def test_bounds_that_tell_nothing_are_refused(run: Path, told: tuple[str, ...], said: str) -> None:
    result = CliRunner().invoke(app, ["intervals", str(run), *told])
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_run_without_a_teacher_or_guidance_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(RunFolder(tmp_path / "run").teacher)
    refused = CliRunner().invoke(app, ["intervals", str(tmp_path / "run"), "--log-snr-max", "1"])
    assert refused.exit_code == 1
    assert "holds no trained network" in refused.stderr
    off = read_recipe("digits", [*OVERRIDES, "evaluation.guidance_scales=[1.0]"])
    shutil.copytree(run, tmp_path / "off")
    RunFolder(tmp_path / "off").recipe.write_text(json.dumps(off.model_dump(mode="json")))
    refused = CliRunner().invoke(app, ["intervals", str(tmp_path / "off"), "--log-snr-max", "1"])
    assert refused.exit_code == 2
    assert "evaluation.guidance_scales: none is above 1" in refused.stderr


def test_a_chain_that_draws_more_where_its_teacher_is_guided_has_a_teacher_guided_everywhere_too(
    run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, other := tmp_path / "run")
    told = ["guidance.log_snr_min=-2.0", "stage_two.guided_share=0.7"]
    (other / "recipe.yaml").write_text(read_recipe(run / "recipe.yaml", told).to_yaml())
    called(other, "--log-snr-max", "1", "--steps", "4")
    names = [row.model for row in IntervalReport.model_validate_json((other / JSON_NAME).read_bytes()).rows]
    assert names == ["guided everywhere", "guided up to log-SNR 1"]
