"""Curves of an evaluation over guidance, one line a model beside the teacher's, as in the paper's figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from distill_jobs.charts import Line, Panel, draw_panels
from distill_jobs.choices import AGREEMENTS, is_student, titled
from distill_jobs.contenders import TEACHER
from engines.manifest import EvaluationRow

FOLDER = "curves"
OVER_GUIDANCE = {
    "frechet_distance": "Fréchet distance",
    "class_agreement": "class agreement",
    "glyph_top_1": "nearest glyph is the prompted one",
    "text_agreement": "text agreement",
    "recall": "recall",
    "coverage": "coverage",
    "paired_distance": "distance to the teacher",
}
TRADE_OFF = "trade_off"
_Curves = dict[str, list[EvaluationRow]]
_Panels = dict[str, _Curves]


def write_curves(folder: Path, rows: Sequence[EvaluationRow], reference_steps: int) -> None:
    """``curves/MEASURE.png`` over guidance and ``curves/trade_off.png``: the teacher, and a line a step count.

    Of measures that every row has.
    """
    students = _grouped(filter(is_student, rows), lambda row: f"{titled(row)}, {_steps(row.steps)}")
    _write(folder / FOLDER, {"": _teacher(rows, reference_steps) | students})


def write_comparison_curves(folder: Path, rows: Sequence[EvaluationRow], reference_steps: int) -> None:
    """The same with a panel a step count, and a line a model in each: for the models of several runs."""
    teacher = _teacher(rows, reference_steps)
    by_steps = _grouped(filter(is_student, rows), lambda row: _steps(row.steps))
    _write(folder / FOLDER, {steps: teacher | _grouped(own, titled) for steps, own in by_steps.items()})


def picture_links(rows: Iterable[EvaluationRow]) -> list[str]:
    """Markdown of the pictures of these rows, for a page in the same folder."""
    measures, agreement = _measured(rows)
    pictures = {name: f"{title} over guidance" for name, title in measures.items()}
    if agreement is not None:
        pictures[TRADE_OFF] = f"Fréchet distance against {measures[agreement]}"
    return [f"![{title}]({FOLDER}/{name}.png)" for name, title in pictures.items()]


def _measured(rows: Iterable[EvaluationRow]) -> tuple[dict[str, str], str | None]:
    """The measures that all rows have, with their titles, and the agreement that distance is traded for."""
    known = [row.metrics.keys() for row in rows]
    measures = {name: title for name, title in OVER_GUIDANCE.items() if all(name in each for each in known)}
    agreements = [name for name in AGREEMENTS if name in measures and "frechet_distance" in measures]
    return measures, agreements[0] if agreements else None


def _teacher(rows: Iterable[EvaluationRow], steps: int) -> _Curves:
    return {f"teacher, {_steps(steps)}": [row for row in rows if (row.model, row.steps) == (TEACHER, steps)]}


def _grouped(rows: Iterable[EvaluationRow], key: Callable[[EvaluationRow], str]) -> _Curves:
    """Rows by key, most steps first, in order of guidance."""
    groups: _Curves = {}
    for row in sorted(rows, key=lambda row: (-row.steps, row.guidance_scale)):
        groups.setdefault(key(row), []).append(row)
    return groups


def _write(folder: Path, panels: _Panels) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    measures, agreement = _measured(row for curves in panels.values() for rows in curves.values() for row in rows)
    for measure, title in measures.items():
        drawn = _drawn(panels, lambda row: row.guidance_scale, _mean(measure))
        draw_panels(drawn, "guidance_scale", title).save(folder / f"{measure}.png", optimize=True)
    if agreement is not None:
        drawn = _drawn(panels, _mean(agreement), _mean("frechet_distance"))
        picture = draw_panels(drawn, measures[agreement], measures["frechet_distance"])
        picture.save(folder / f"{TRADE_OFF}.png", optimize=True)


def _drawn(
    panels: _Panels, x: Callable[[EvaluationRow], float], y: Callable[[EvaluationRow], float]
) -> list[Panel]:
    return [
        Panel(title, tuple(Line(label, tuple((x(row), y(row)) for row in rows)) for label, rows in curves.items()))
        for title, curves in panels.items()
    ]


def _mean(measure: str) -> Callable[[EvaluationRow], float]:
    return lambda row: row.metrics[measure].mean


def _steps(n: int) -> str:
    return "1 step" if n == 1 else f"{n} steps"
