"""Settings from the environment: what is accepted, and the one sentence for what is not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.settings import Settings

SPELLINGS = [
    ("/a", ["/a"]),
    (os.pathsep.join(["/a", "/b c"]), ["/a", "/b c"]),
    ('["/a", "/b"]', ["/a", "/b"]),
]


@pytest.mark.parametrize(("text", "paths"), SPELLINGS)
def test_bundles_are_paths_or_json(text: str, paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HALFSTEP_BUNDLES", text)
    assert Settings().bundles == tuple(map(Path, paths))


WRONG = [
    ("HALFSTEP_BUNDLES", '["/a"'),
    ("HALFSTEP_BUNDLES", "[1]"),
    ("HALFSTEP_BUNDLES", "[]"),
    ("HALFSTEP_BUNDLES", ""),
    ("HALFSTEP_PORT", "many"),
    ("HALFSTEP_BACKEND", "cuda"),
]


@pytest.mark.parametrize(("variable", "value"), WRONG)
def test_a_wrong_setting_is_one_sentence(variable: str, value: str) -> None:
    ended = CliRunner().invoke(app, ["serve"], env={variable: value, "COLUMNS": "500"})
    assert ended.exit_code == 1
    assert variable in ended.output
    assert ended.output.count("\n") == 1
    assert isinstance(ended.exception, SystemExit)
