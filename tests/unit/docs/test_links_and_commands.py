"""Every link of the documents leads somewhere, and every command they name exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from distill_jobs.recipe_file import shipped_recipes
from tests.unit.docs.pages import APPS, CARDS, PAGES, PAST, ROOT, click_commands, options


@pytest.mark.parametrize("path", [*PAGES, *CARDS, *PAST], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_resolve(path: Path) -> None:
    text, folder = path.read_text(encoding="utf-8"), ROOT / "docs" if path in CARDS else path.parent
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (folder / file).resolve() if file else path
        assert linked.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in anchors(linked), f"{target} has no such heading"


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*PAGES, *CARDS], ids=lambda path: path.relative_to(ROOT).as_posix())
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
    own = {name for name in recipes if name.endswith(".yaml")}  # a reader's own file
    assert {*recipes} <= {*shipped_recipes(), "RECIPE", *own}


def check_make_command(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, is_variable, _ = word.partition("=")
        pattern = rf"^{name} \?=" if is_variable else rf"^{name}:"
        assert re.search(pattern, makefile, re.M), f"the Makefile has no {name}"


def code_spans(text: str) -> Iterator[str]:
    """Every line of fenced code, continuations joined, and every inline span."""
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.S | re.M)
    for block in fenced:
        yield from block.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
