"""The documents say what the code says: settings, fields, errors, metrics, recipe, commands and links."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import typer
from prometheus_client import Counter, Gauge, Histogram
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from distill_jobs.cli import app as distill_app
from distill_jobs.data.digits import class_condition
from distill_jobs.errors import JobError
from distill_jobs.recipe import Recipe
from distill_jobs.recipe_file import shipped_recipes
from distill_jobs.sampling import student_network
from distill_jobs.sections import Halving
from distill_jobs.student import load_stock
from engines.bundle import verify_bundle
from engines.cli import app as engines_app
from engines.manifest import MANIFEST_NAME, BundleManifest
from engines.pipeline import RUNGS
from engines.sampler import sampler_plan
from engines.schedule import NoiseSchedule
from server.cli import app as server_app
from server.job_schemas import JobBody, JobStateBody
from server.metrics import Metrics, StoreTotals
from server.schemas import GenerationBody, ImagesResponse, ModelBody
from server.settings import Settings
from tests.support.tiny_run import tiny_recipe, write_tiny_run

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
APPS = {"server": server_app, "engines": engines_app, "distill_jobs": distill_app}


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def table_rows(text: str) -> list[list[str]]:
    """Cells of every table line, backticks and blanks stripped."""
    lines = (line for line in text.splitlines() if line.startswith("|"))
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def code_spans(text: str) -> Iterator[str]:
    """Every line of fenced code, continuations joined, and every inline span."""
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.S | re.M)
    for block in fenced:
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


# ---- serving


def test_every_setting_is_in_the_table() -> None:
    rows = {row[0]: row for row in table_rows(page("serving.md")) if len(row) == 6}
    flags = {flag for command in click_commands("server").values() for flag in options(command)}
    for name, field in Settings.model_fields.items():
        _, variable, flag, default, _, meaning = rows.pop(name)
        expected = "server/bundles/default" if name == "bundles" else str(field.default).lower()
        assert (variable, default) == (f"HALFSTEP_{name.upper()}", expected)
        own = "--bundle" if name == "bundles" else f"--{name.replace('_', '-')}"
        assert flag == (own if own in flags else ""), name
        assert meaning
    assert set(rows) == {"setting", "---"}


@pytest.mark.parametrize("schema", [GenerationBody, ImagesResponse, JobBody, JobStateBody, ModelBody])
def test_every_field_of_the_api_is_named(schema: type[BaseModel]) -> None:
    text = page("serving.md")
    missing = [name for name in schema.model_fields if f"`{name}`" not in text and name != "object"]
    assert not missing


def test_request_fields_are_a_row_each() -> None:
    section = page("serving.md").partition("## Draw images")[2].partition("### Response")[0]
    named = {row[0] for row in table_rows(section)} - {"field", "---"}
    assert named == set(GenerationBody.model_fields)


def test_every_error_code_is_in_the_table_and_the_other_way_round() -> None:
    section = page("serving.md").partition("## Errors")[2].partition("## Models")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    documented = {code for row in rows for code in re.findall(r"`([a-z0-9_]+)`", row.split("|")[2])}
    assert documented == codes_in_source()


def codes_in_source() -> set[str]:
    """Codes the server and the engines give their errors, read from the calls that make them."""
    where = {"ApiError": 1, "InvalidRequestError": 0, "NotFoundError": 0, "OverloadedError": 0, "RateError": 0}
    where |= {"RequestError": 1}
    found: set[str] = set()
    for file in [*(ROOT / "server").rglob("*.py"), *(ROOT / "engines").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                argument = where.get(node.func.id, 99)
                candidates = [*node.args[argument : argument + 1]]
                if node.func.id == "JobFailure":
                    candidates = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).strip("()") == "code, message":
                candidates = list(getattr(node.value, "elts", []))[:1]
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_STATUS_ERRORS":
                candidates = [value.elts[0] for value in getattr(node.value, "values", [])]
            else:
                continue
            texts = [c.value for c in candidates if isinstance(c, ast.Constant) and isinstance(c.value, str)]
            found.update(texts)
    return found | {"http_error"}


def test_every_metric_is_in_the_table_with_its_labels() -> None:
    section = page("serving.md").partition("| metric |")[2].partition("\n\n")[0]
    documented = {
        cells[1].strip().strip("`"): set(re.findall(r"`(\w+)`", cells[2]))
        for cells in (line.split("|") for line in section.splitlines()[2:])
    }
    metrics = [m for m in vars(Metrics()).values() if isinstance(m, Counter | Gauge | Histogram)]
    names = {
        m.describe()[0].name + ("_total" if isinstance(m, Counter) else ""): set(m._labelnames) for m in metrics
    }
    names |= {f"{family.name}_total": set(family._labelnames) for family in StoreTotals().collect()}
    assert documented == names


# ---- distilling and engines


def test_every_field_of_the_recipe_is_in_the_table_with_its_default() -> None:
    section = page("distilling.md").partition("## The recipe")[2].partition("\n## ")[0]
    documented = {row[0]: row[1] for row in table_rows(section)[2:]}
    assert documented == dict(recipe_fields(Recipe))
    assert all(
        f"`{{{', '.join(Halving.model_fields)}}}`" in line for line in section.splitlines() if "halvings`" in line
    )


def recipe_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        optional = type(None) in get_args(field.annotation)
        kind = get_args(field.annotation)[0] if optional else field.annotation
        section = isinstance(kind, type) and issubclass(kind, BaseModel)
        if section:
            yield from recipe_fields(kind, f"{prefix}{name}.")
        if optional or not section:
            required = field.default is PydanticUndefined
            yield f"{prefix}{name}", "required" if required else json.dumps(field.default)


def test_exit_codes_and_manifest_are_complete() -> None:
    text = page("distilling.md")
    codes = set(re.findall(r"^\| (\d) \|", text, re.M))
    assert codes == {"0", "1", *(str(error.exit_code) for error in JobError.__subclasses__())}
    assert f"{MANIFEST_NAME} " in text
    assert not [name for name in BundleManifest.model_fields if f"`{name}`" not in text]


def test_the_rungs_are_those_of_the_code() -> None:
    *first, last = map(str, RUNGS)
    assert f"rungs {', '.join(first)} and {last}" in page("engines.md")


def test_the_diffusers_snippet_draws_what_our_sampler_draws(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    folder = write_tiny_run(tmp_path / "run", recipe) / "students" / "d4"
    (snippet,) = re.findall(r"^```python\n(.*?)^```", page("distilling.md"), re.S | re.M)
    assert snippet.count("runs/digits/students/d4") == 1
    result: dict[str, Any] = {}
    exec(snippet.replace("runs/digits/students/d4", str(folder)), result)
    network = student_network(load_stock(folder), result["guidance_scale"] - 1)
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        for step in sampler_plan(NoiseSchedule(recipe.schedule), 4, clip=recipe.clip):
            x, _ = step.apply(x, network(x, step.timestep, class_condition(torch.tensor([7]))))
    torch.testing.assert_close(result["image"], x, rtol=0, atol=1e-4)
    assert result["pixels"].shape == (1, 1, 8, 8)


# ---- links and commands


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_resolve(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in anchors(linked), f"{target} has no such heading"


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_exist(path: Path) -> None:
    for code in code_spans(path.read_text(encoding="utf-8")):
        for module, rest in re.findall(r"python -m (\S+)([^|;#]*)", code):
            check_module_command(module, rest)
        for rest in re.findall(r"(?<![\w./-])make ((?:[a-z]+(?:-[a-z]+)*|[A-Z]+=\S+)(?: [A-Z]+=\S+)*)", code):
            check_make_command(rest.split())


def check_module_command(module: str, rest: str) -> None:
    if module not in APPS:
        assert find_spec(module) is not None, f"python -m {module} does not exist"
        return
    words = shlex.split(rest)
    if not words or words == ["--help"]:
        return
    commands = click_commands(module)
    assert words[0] in commands, f"python -m {module} {words[0]} does not exist"
    command = commands[words[0]]
    if hasattr(command, "commands"):
        assert words[1] in command.commands, f"python -m {module} {words[0]} {words[1]} does not exist"
        command = command.commands[words[1]]
    known = options(command) | {"--help"}
    used = {word.partition("=")[0] for word in words[1:] if word.startswith("--")}
    assert used <= known, f"python -m {module} {words[0]} has no {used - known}"
    recipes = [words[1]] if (module, words[0]) == ("distill_jobs", "run") and words[1:] else []
    assert all(name in {*shipped_recipes(), "RECIPE"} for name in recipes)


@cache
def click_commands(module: str) -> dict[str, Any]:
    return dict(typer.main.get_command(APPS[module]).commands)  # type: ignore[attr-defined]


def options(command: Any) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def check_make_command(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, is_variable, _ = word.partition("=")
        pattern = rf"^{name} \?=" if is_variable else rf"^{name}:"
        assert re.search(pattern, makefile, re.M), f"the Makefile has no {name}"


def test_the_model_card_holds_the_embedded_bundles_quality_table() -> None:
    manifest = verify_bundle(ROOT / "server" / "bundles" / "default").manifest
    card = page("model-card-digits.md")
    for row in manifest.evaluation.rows:
        distance = row.metrics["frechet_distance"]
        figures = f"| {row.steps} | {row.evaluations} | {distance.mean:.3f} ± {distance.spread:.3f} |"
        assert f"| {row.guidance_scale:g} | {row.model} {figures}" in card
