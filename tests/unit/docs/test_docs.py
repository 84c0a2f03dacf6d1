"""The documents say what the code says: settings, fields, errors, metrics, recipe, manifest and figures."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
import torch
from prometheus_client import Counter, Gauge, Histogram
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from distill_jobs.contenders import STUDENT, TEACHER
from distill_jobs.data.digits import class_condition
from distill_jobs.errors import JobError
from distill_jobs.gates import FRECHET
from distill_jobs.pipelines.glyphs import GLYPHS, TOP_1
from distill_jobs.recipe import Recipe
from distill_jobs.sampling import student_network
from distill_jobs.sections import Halving
from distill_jobs.student import load_stock
from distill_jobs.tables import quality_table
from distill_jobs.task_tables import task_lines
from engines.backends.base import RUNGS
from engines.bundle import verify_bundle
from engines.manifest import MANIFEST_NAME, BundleManifest
from engines.sampler import sampler_plan
from engines.schedule import NoiseSchedule
from server.job_schemas import JobBody, JobStateBody
from server.metrics import Metrics, StoreTotals
from server.schemas import GenerationBody, ImagesResponse, ModelBody
from server.settings import DEFAULT_BUNDLE, Settings
from server.settings_page import settings_page
from tests.support.tiny_run import tiny_recipe, write_tiny_run
from tests.unit.docs.pages import APPS, ROOT, click_commands, options, page, table_rows

UNIONS = (Union, UnionType)

# ---- serving


def test_the_configuration_reference_is_that_of_the_settings() -> None:
    assert page("configuration.md") == settings_page(APPS["server"]), "make docs"


def test_the_configuration_reference_has_every_setting_once_with_its_flag() -> None:
    rows = {row[0]: row for row in table_rows(page("configuration.md")) if row[0] not in ("setting", "---")}
    assert list(rows) == list(Settings.model_fields)
    flags = {flag for command in click_commands("server").values() for flag in options(command)}
    for name, (_, variable, flag, value, default, meaning) in rows.items():
        own = "--bundle" if name == "bundles" else f"--{name.replace('_', '-')}"
        assert variable == f"HALFSTEP_{name.upper()}"
        assert flag.partition("`")[0] == (own if own in flags else ""), name
        assert value
        assert default
        assert meaning


def test_the_reference_says_what_a_value_may_be_and_is() -> None:
    rows = {row[0]: row for row in table_rows(page("configuration.md"))}
    expected = {
        "port": ("`--port` of serve, api", "integer, ≥ 0, ≤ 65535", "8000"),
        "lease_s": ("", "seconds, > 3", "30.0"),
        "allow_anonymous": ("", "`true`, `false`", "false"),
        "bundles": ("`--bundle` of plan, serve, api, worker", "folders", "server/bundles/emoji"),
        "secret": ("", "text", "empty"),
        "metrics_port": ("`--metrics-port` of api, worker", "integer, ≥ 0, ≤ 65535", "none"),
    }
    for name, (flag, value, default) in expected.items():
        assert [cell.strip("`") for cell in (flag, value, default)] == rows[name][2:5]


def test_only_first_sentences_are_the_help_of_flags() -> None:
    (flag,) = [each for each in click_commands("server")["serve"].params if each.name == "bundle"]
    assert flag.help == "folders of the models to serve (env HALFSTEP_BUNDLES)"


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
    where |= {"RequestError": 1, "not_worth_a_retry": 1}
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
    section = page("recipe.md")
    documented = {row[0]: row[1] for row in table_rows(section)[2:]}
    assert documented == dict(recipe_fields(Recipe))
    assert all(
        f"`{{{', '.join(Halving.model_fields)}}}`" in line for line in section.splitlines() if "halvings`" in line
    )


def recipe_fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Of every form that a field can have: a section, one of several, or a plain value."""
    for name, field in model.model_fields.items():
        forms = get_args(field.annotation) if get_origin(field.annotation) in UNIONS else (field.annotation,)
        kinds = [get_args(form)[0] if get_origin(form) is Annotated else form for form in forms]
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        for section in sections:
            yield from recipe_fields(section, f"{prefix}{name}.")
        if len(sections) < len(kinds):
            required = field.default is PydanticUndefined
            yield f"{prefix}{name}", "required" if required else json.dumps(field.default, default=str)


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


def test_the_card_of_digits_holds_its_bundles_quality_table() -> None:
    manifest = verify_bundle(ROOT / "server" / "bundles" / "digits").manifest
    card = page("model-card-digits.md")
    for row in manifest.evaluation.rows:
        distance = row.metrics["frechet_distance"]
        figures = f"| {row.steps} | {row.evaluations} | {distance.mean:.3f} ± {distance.spread:.3f} |"
        assert f"| {row.guidance_scale:g} | {row.model} {figures}" in card


def test_the_card_of_the_embedded_model_holds_its_bundles_tables() -> None:
    manifest = verify_bundle(DEFAULT_BUNDLE).manifest
    card = page(f"model-card-{manifest.name}.md")
    for line in (*quality_table(manifest.evaluation.rows), *task_lines(manifest.tables)):
        assert line.startswith("#") or line in card
    assert manifest.recipe.sha256 in card


def test_the_readmes_table_is_the_embedded_bundles() -> None:
    manifest, told = verify_bundle(DEFAULT_BUNDLE).manifest, (ROOT / "README.md").read_text()
    rows = {(row.guidance_scale, row.model, row.steps): row.metrics for row in manifest.tables[GLYPHS]}
    for scale in sorted({scale for scale, _, steps in rows if steps}):
        asked = [(scale, TEACHER, 50), (scale, TEACHER, 3), (scale, STUDENT, 4), (scale, STUDENT, 1)]
        cells = [f"{rows[each][TOP_1].mean:.3f} / {rows[each][FRECHET].mean:.3f}" for each in asked]
        assert f"| {scale:g} | {' | '.join(cells)} |" in told
