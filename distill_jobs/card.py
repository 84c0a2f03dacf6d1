"""Model cards: pages in which people say what a model is for, and the report of its run says the rest.

A page holds marks such as ``<!-- report: quality -->`` and ``<!-- end -->``; what stands between two of them is
written anew from the run each time. The first time a card begins as the one that its recipe came with, or bare.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path

from safetensors import safe_open

from distill_jobs.checkpoint import write_text
from distill_jobs.errors import JobError
from distill_jobs.latent_sections import CaptionedData, LatentTeacher
from distill_jobs.recipe import Recipe
from distill_jobs.report import RunReport
from distill_jobs.run_folder import RunFolder
from distill_jobs.tables import gate_table
from distill_jobs.task_tables import task_lines

MARKED = re.compile(r"(?P<mark><!-- report: (?P<name>\w+) -->\n).*?(?P<end><!-- end -->)", re.S)
BARE = """# Model card: {name}

{description}

## Use

Say here what the model is for, and what it is not for.

## How it was made

<!-- report: made -->
<!-- end -->

## Quality

<!-- report: quality -->
<!-- end -->

## Targets

<!-- report: targets -->
<!-- end -->

## Limits

Say here what fails.
"""


def write_card(run: RunFolder, recipe: Recipe, report: RunReport, page: Path) -> None:
    """Fill in ``page``, or begin it, and put the run's sheet of prompts beside it.

    Raises: JobError where a mark of the page is none of ours, or the page has none; StorageError.
    """
    page.parent.mkdir(parents=True, exist_ok=True)
    sheet = Path("images") / f"{recipe.export.name}-prompts.png"
    if run.sample_sheet.is_file():
        (page.parent / sheet).parent.mkdir(exist_ok=True)
        shutil.copyfile(run.sample_sheet, page.parent / sheet)
    parts = {
        "made": lambda: _made(run, recipe, report),
        "quality": report.quality,
        "tasks": lambda: "\n".join(task_lines(report.tasks)).rstrip(),
        "targets": lambda: "\n".join(gate_table(report.gates)[2:]),
        "sheet": lambda: f"![Prompts, and what teacher and students make of them]({sheet.as_posix()})",
    }
    text = page.read_text(encoding="utf-8") if page.is_file() else _begun(recipe)
    write_text(page, filled(text, parts))


def filled(text: str, parts: Mapping[str, Callable[[], str]]) -> str:
    """The page with each of its marked places written anew. Raises: JobError."""

    def written(found: re.Match[str]) -> str:
        part = parts.get(found["name"])
        if part is None:
            raise JobError(f"the card's mark 'report: {found['name']}' is none of: {', '.join(parts)}")
        return f"{found['mark']}{part()}\n{found['end']}"

    if not MARKED.search(text):
        raise JobError("the card has no place such as '<!-- report: quality -->' … '<!-- end -->' to fill in")
    return MARKED.sub(written, text)


def _begun(recipe: Recipe) -> str:
    shipped = resources.files("distill_jobs.recipes") / f"{recipe.name}.card.md"
    if shipped.is_file():
        return shipped.read_text(encoding="utf-8")
    return BARE.format(name=recipe.export.name, description=recipe.export.description)


def _made(run: RunFolder, recipe: Recipe, report: RunReport) -> str:
    """What stands in a table of facts."""
    facts = {
        "recipe": f"`{recipe.name}`, sha256 `{recipe.sha256()}`",
        "seed": str(recipe.seed),
        "machine": f"{report.machine.processor}, {report.machine.cores} cores",
        "libraries": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        **({"guided": recipe.guidance.interval} if recipe.guidance.interval else {}),
        **({"precision of training": recipe.compute.precision} if recipe.compute.precision != "fp32" else {}),
        "training": f"{sum(report.training_seconds.values()) / 3600:.1f} hours in all",
        **{f"parameters of {name}": f"{count:,}" for name, count in parameters(run).items()},
    }
    if isinstance(recipe.teacher, LatentTeacher) and isinstance(recipe.data, CaptionedData):
        facts |= {"licence of the data": recipe.data.licence, "licence of the weights": recipe.teacher.licence}
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())])


def parameters(run: RunFolder) -> dict[str, int]:
    """By part of the teacher's pipeline, how many numbers its weights are."""
    counts: dict[str, int] = {}
    for file in sorted(run.teacher.glob("*/*.safetensors")):
        with safe_open(file, "np") as weights:
            shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118 - no mapping
        counts[file.parent.name] = counts.get(file.parent.name, 0) + sum(map(math.prod, shapes))
    return counts
