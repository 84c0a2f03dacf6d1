"""Finished phases of another run, copied where both recipes say that they would come out the same.

So that runs which differ in a later phase are compared on the very same teacher, without training it again.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_jobs.checkpoint import link_or_copy, write_folder, write_text
from distill_jobs.latent_sections import FolderTeacher, MadeTeacher
from distill_jobs.recipe import Recipe
from distill_jobs.recipe_file import SAID_OR_KEPT, WITHOUT_EFFECT, differences, without_rounding
from distill_jobs.run_folder import RunFolder, stored_recipe
from distill_jobs.sections import ChainSection
from distill_jobs.student import weights_sha256

LATER = {"guidance", "stage_one", "stage_two", "consistency", "encoder", "decoder"}
"""Fields that the teacher does not see."""
TEACHERS, DECODER = ("autoencoder", "text_encoder", "teacher", "finetune", "v_finetune"), "decoder"
"""Names of phases that learn from data alone."""


@dataclass(frozen=True)
class Past:
    """A phase and all that its result depends on: recipe fields of its own and of the phases before it.

    results: files and folders that it leaves in the run folder; mark: the file there that says it is done.
    instead: the phase before it that nobody needs once this one is done.
    """

    name: str
    results: tuple[str, ...]
    mark: str
    fields: dict[str, Any]
    instead: str | None = None

    def stands(self, folder: RunFolder) -> bool:
        return (folder.path / self.mark).is_file()

    @property
    def learned(self) -> bool:
        """Whether it learned from a teacher, rather than being one or a part of one."""
        return self.name not in (*TEACHERS, DECODER)


@dataclass(frozen=True)
class Takeable:
    """What one run can take from another. phases: the same one there and here; refused: the others, and why."""

    phases: tuple[tuple[Past, Past], ...]
    refused: tuple[tuple[str, str], ...]

    @property
    def names(self) -> frozenset[str]:
        """Of the phases that need no training."""
        return frozenset(name for _, mine in self.phases for name in (mine.name, mine.instead) if name)


def takeable(recipe: Recipe, source: RunFolder) -> Takeable:
    """The phases of ``recipe`` that stand in ``source`` with an equal past. Raises: RecipeError, no run there."""
    theirs = {past.name: past for past in pasts(stored_recipe(source))}
    taken, refused = [], []
    for mine in pasts(recipe):
        past = theirs.get(mine.name)
        if past is None:
            refused.append((mine.name, "it has none"))
        elif changed := differences(past.fields, mine.fields):
            refused.append((mine.name, f"{', '.join(changed)} differs"))
        elif not past.stands(source):
            refused.append((mine.name, "not finished there"))
        else:
            taken.append((past, mine))
    needless = {mine.instead for _, mine in taken}
    return Takeable(tuple(taken), tuple(each for each in refused if each[0] not in needless))


def take_phases(recipe: Recipe, source: RunFolder, destination: RunFolder) -> Iterator[str]:
    """Copy what can be taken and does not stand yet, a line said of each.

    What the source had read is kept beside it: the run ends where it reads other images, or has another teacher.
    Raises: RecipeError; StorageError.
    """
    found = takeable(recipe, source)
    for theirs, mine in found.phases:
        if not mine.stands(destination):
            if mine.learned:
                _keep_read(source, destination)
            for there, here in zip(theirs.results, mine.results, strict=True):
                copy_phase(source.path / there, destination.path / here)
            yield f"{mine.name}: taken from {source.path}"
    for name, reason in found.refused:
        yield f"{name}: not taken from {source.path}: {reason}"


def pasts(recipe: Recipe) -> tuple[Past, ...]:
    """The phases of a recipe in their order, each with its past."""
    fields = without_rounding(recipe.model_dump(mode="json", exclude=WITHOUT_EFFECT))
    fields["guidance"].pop("default")
    for section, _, name in (dotted.partition(".") for dotted in SAID_OR_KEPT):
        if isinstance(fields[section], dict):
            fields[section].pop(name, None)
    own = {name: fields.pop(name) for name in LATER}
    own["stage_one"].pop("max_relative_error")  # it changes no weights, and is asked again of what is taken
    found = list(_teachers(recipe, fields))
    if recipe.decoder is not None:
        made = isinstance(recipe.teacher, MadeTeacher)
        seen = _of_autoencoder(fields) if made else _computed_anyhow(fields)
        past = {**seen, "decoder": own["decoder"]}
        found.append(Past(DECODER, ("decoder",), "decoder/phase.json", past))
    fields |= {name: own[name] for name in ("guidance", "stage_one")}
    kept = "shared" if recipe.stage_two.weights == "shared" else "students"
    chain = {**fields, "stage_two": own["stage_two"]}
    if recipe.stage_two.guidance == "at_sampling":
        found += _chain("d", recipe.stage_two, "students/d", chain, "stage_two")
        found += _chain("u", recipe.stage_two, "unconditional/d", chain, "stage_two")
        return tuple(found)
    found.append(Past("stage_one", ("stage_one", "gate.json"), "gate.json", dict(fields)))
    found += _chain("d", recipe.stage_two, f"{kept}/d", chain, "stage_two")
    if recipe.consistency is not None:
        own["consistency"].pop("students")
        past = {**fields, "stage_two": own["stage_two"], "consistency": own["consistency"]}
        found.append(Past("consistency", ("consistency",), "consistency/phase.json", past))
    if recipe.encoder is not None:
        own["encoder"].pop("students")
        found += _chain("e", recipe.encoder, "encoders/e", {**fields, "encoder": own["encoder"]}, "encoder")
    return tuple(found)


def _teachers(recipe: Recipe, fields: dict[str, Any]) -> Iterator[Past]:
    """The phases that make the teacher; a folder's network that is taken as it is comes from there again."""
    section, fields = recipe.teacher, _computed_anyhow(fields)
    if isinstance(section, FolderTeacher):
        if section.v_finetune is not None:
            yield Past("v_finetune", ("teacher", "given.json"), "teacher/phase.json", dict(fields))
        return
    if not isinstance(section, MadeTeacher):
        yield Past("teacher", ("classifier", "teacher"), "teacher/phase.json", dict(fields))
        return
    yield Past("autoencoder", ("autoencoder",), "autoencoder/phase.json", _of_autoencoder(fields))
    if section.text.training is not None:
        own = {name: fields["teacher"][name] for name in ("autoencoder", "text")}
        seen = {name: fields[name] for name in ("seed", "data", "unet")}
        yield Past("text_encoder", ("text_encoder",), "text_encoder/phase.json", {**seen, "teacher": own})
    before = {**fields, "teacher": {**fields["teacher"], "finetune": None}}
    at = "teacher" if section.finetune is None else "begun"
    yield Past("teacher", (at,), f"{at}/phase.json", before)
    if section.finetune is not None:
        yield Past("finetune", ("teacher",), "teacher/phase.json", dict(fields), instead="teacher")


def _computed_anyhow(fields: dict[str, Any]) -> dict[str, Any]:
    """How a teacher or a decoder was computed does not matter to those who use it."""
    return {name: field for name, field in fields.items() if name != "compute"}


def _of_autoencoder(fields: dict[str, Any]) -> dict[str, Any]:
    """It sees the pictures, at their size, and nothing else."""
    seen = {name: fields[name] for name in ("seed", "data")}
    size, own = fields["unet"]["sample_size"], fields["teacher"]["autoencoder"]
    return {**seen, "unet": {"sample_size": size}, "teacher": {"autoencoder": own}}


def _chain(prefix: str, section: ChainSection, at: str, fields: dict[str, Any], key: str) -> Iterator[Past]:
    """The halvings of a chain; the past of each holds those before it. Which are kept changes no network."""
    halvings = [{name: each[name] for name in each if name != "keep"} for each in fields[key]["halvings"]]
    for position, steps in enumerate(section.steps):
        own = {**fields[key], "halvings": halvings[: position + 1]}
        yield Past(f"{prefix}{steps}", (f"{at}{steps}",), f"{at}{steps}/phase.json", {**fields, key: own})


def _keep_read(source: RunFolder, destination: RunFolder) -> None:
    stands = (source.teacher / "unet").is_dir()
    destination.keep_read_by(source, weights_sha256(source.teacher) if stands else None)


def copy_phase(source: Path, destination: Path) -> None:
    """A file or folder that a phase left, in one move; nothing where there is none. Raises: StorageError.

    Of a folder the files are hard links, where the disk has them: no finished one is written in place.
    """
    if source.is_dir():

        def fill(staging: Path) -> None:
            shutil.copytree(source, staging, dirs_exist_ok=True, copy_function=link_or_copy)

        write_folder(destination, fill)
    elif source.is_file():
        write_text(destination, source.read_text(encoding="utf-8"))
