"""Recipes as files: YAML, changed with ``--set key=value``; and what differs between two of them."""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from distill_jobs.errors import RecipeError
from distill_jobs.latent_sections import FORMS, form_of_teacher
from distill_jobs.pipelines.teacher import filled_from_teacher
from distill_jobs.recipe import Recipe

WITHOUT_EFFECT = {"name", "evaluation", "export", "checkpoint_every", "log_every"}
"""Sections and fields on which no phase's result depends."""

GATE_LIMIT = "stage_one.max_relative_error"
"""Nor does any depend on this one: it only says whether the job goes on."""

SAID_OR_KEPT = ("data.licence", "data.cache", "teacher.licence", "teacher.max_relative_error")
"""Nor on these: what a bundle says of itself, where latents are kept (they are found by what made them), and which
folder is refused."""

ROUNDING = {"accumulate", "gradient_checkpointing"}
"""Nor, but for rounding, on fields of these names: how a batch fits a device, as the number of processes is."""


_FORMS = {
    "dict_type": "must be a section, field by field",
    "model_type": "must be a section, field by field",
    "tuple_type": "must be a list, such as [1, 2]",
}
"""What is expected, in words of YAML, by the type of an error."""


class _EachKeyOnce(yaml.SafeLoader):
    """YAML in which a key given twice is an error, not the last one's value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for position, key in enumerate(keys) if key in keys[:position]]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_recipe(source: str | Path, overrides: list[str] | None = None) -> Recipe:
    """A recipe by file path, or by the name of one shipped with halfstep, with ``key.sub=value`` overrides.

    A recipe with ``base`` is that shipped recipe, changed where its own fields say otherwise: sections field by
    field, everything else (lists too, and a teacher of another form) as a whole. Values are YAML.
    Raises: RecipeError naming every wrong field.
    """
    data = _load(source)
    for override in overrides or []:
        _override(data, override)
    try:
        return Recipe.model_validate(filled_from_teacher(data))
    except ValidationError as error:
        wrong = "; ".join(_told(each) for each in error.errors(include_url=False))
        raise RecipeError(f"recipe {source}: {wrong}") from None


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with halfstep."""
    folder = resources.files("distill_jobs.recipes")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def without_effect(name: str) -> bool:
    """Whether no phase's result depends on a field, by its dotted name, but for rounding."""
    parts = name.split(".")
    return parts[0] in WITHOUT_EFFECT or parts[-1] in ROUNDING or name in (GATE_LIMIT, *SAID_OR_KEPT)


def without_rounding(value: Any) -> Any:
    """Nested mappings without the fields on which only rounding depends."""
    if not isinstance(value, dict):
        return value
    return {name: without_rounding(each) for name, each in value.items() if name not in ROUNDING}


def changed_fields(old: Recipe, new: Recipe) -> list[str]:
    """Dotted names of the fields in which two recipes differ."""
    return differences(old.model_dump(mode="json"), new.model_dump(mode="json"))


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted names of the values in which two nested mappings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(k for k in new if k not in old)]
        return [d for k in names for d in differences(old.get(k), new.get(k), f"{prefix}{k}.")]
    return [] if old == new else [prefix.rstrip(".")]


def _told(error: ErrorDetails) -> str:
    """One wrong field, and what is wrong with it."""
    names = [part for part in map(str, error["loc"]) if not part.startswith("(")]
    message = _FORMS.get(error["type"], error["msg"].removeprefix("Value error, "))
    if error["type"] == "extra_forbidden":
        near = get_close_matches(names[-1], _field_names(), 1)
        message = "there is no such field" + "".join(f", did you mean {name}?" for name in near)
        if names[-1] in near:
            message = "that is a field of other sections, not of this one"
    return f"{'.'.join(names)}: {message}" if names else message


@cache
def _field_names() -> tuple[str, ...]:
    """Of all sections."""
    schema = Recipe.model_json_schema()
    parts = (schema, *schema["$defs"].values())
    return tuple(sorted({name for part in parts for name in part.get("properties", ())}))


def _load(source: str | Path) -> dict[str, Any]:
    """The recipe's mapping on top of its base's."""
    data, bases = _parse(source), [str(source)]
    while (base := data.pop("base", None)) is not None:
        if base not in shipped_recipes() or base in bases:
            raise RecipeError(f"recipe {source}: base: must be another of {', '.join(shipped_recipes())}")
        bases.append(base)
        data = _merged(_without_other_teacher(_parse(base), data), data)
    return data


def _without_other_teacher(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The base, without its teacher where the changes name one of another form: given, not made, or the reverse."""
    theirs = changes.get("teacher")
    named = isinstance(theirs, dict) and any(field in theirs for field in FORMS.values())
    if named and form_of_teacher(theirs) != form_of_teacher(base.get("teacher")):
        return {name: value for name, value in base.items() if name != "teacher"}
    return base


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in changes.items():
        below = merged.get(name)
        merged[name] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _parse(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if not path.is_file():
        shipped = resources.files("distill_jobs.recipes") / f"{source}.yaml"
        if not shipped.is_file():
            known = ", ".join(shipped_recipes())
            raise RecipeError(f"no recipe {str(source)!r}: give a YAML file or one of: {known}")
        text = shipped.read_text(encoding="utf-8")
    else:
        text = _read(path)
    try:
        data = yaml.load(text, _EachKeyOnce)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {source} is not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise RecipeError(f"recipe {source} must be a YAML mapping")
    return data


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read as UTF-8 text: {error}") from None


def _override(data: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise RecipeError(f"--set takes key=value, not {override!r}")
    try:
        parsed = yaml.load(value, _EachKeyOnce)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        raise RecipeError(f"--set {key}: the value is not valid YAML") from None
    *parents, last = key.split(".")
    for parent in parents:
        if data.get(parent) is None:  # a section that the file leaves out, or says is none
            data[parent] = {}
        data = data[parent]
        if not isinstance(data, dict):
            raise RecipeError(f"--set {key}: {parent} is a value, not a section")
    data[last] = parsed
