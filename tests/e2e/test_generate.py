"""``python -m server generate``: in this process and through a server, to the same bytes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.pictures import file_of, mask_file, photo
from tests.support.serving import ROOT, serving


@pytest.fixture(scope="module")
def url(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving([toy_bundle], log=tmp_path_factory.mktemp("generate") / "log") as server:
        yield server.url


def generate(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", "generate", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_here_and_there_draw_the_same_bytes(url: str, toy_bundle: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here.png", tmp_path / "there.png"
    asked = ("seven", "--seed", 5, "--guidance-scale", 3, "--steps", 4)
    for result in (
        generate(*asked, "--bundle", toy_bundle, "-o", here),
        generate(*asked, "--url", url, "-o", there),
    ):
        assert result.returncode == 0, result.stderr
    assert here.read_bytes() == there.read_bytes()


def test_inpainting_keeps_the_rest(url: str, toy_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(file_of(photo()))
    (tmp_path / "mask.png").write_bytes(mask_file((16, 16, 40, 48)))
    asked = ("three", "--seed", 1, "--image", tmp_path / "photo.png", "--mask", tmp_path / "mask.png")
    files = []
    for name, where in (("here", ("--bundle", toy_bundle)), ("there", ("--url", url))):
        result = generate(*asked, *where, "-o", tmp_path / f"{name}.png")
        assert result.returncode == 0, result.stderr
        files.append((tmp_path / f"{name}.png").read_bytes())
    assert files[0] == files[1]
    drawn = np.asarray(Image.open(tmp_path / "here.png"))
    assert (drawn[:16] == np.asarray(photo())[:16]).all()


def test_several_images_are_named_by_seed_and_nothing_is_overwritten(toy_bundle: Path, tmp_path: Path) -> None:
    asked = ("seven", "-n", 2, "--seed", 8, "--bundle", toy_bundle, "-o", tmp_path / "out.webp")
    assert generate(*asked).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-8.webp", "out-9.webp"]
    again = generate(*asked)
    assert again.returncode == 1
    assert "--force" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("a horse",), "zero"),
        (("seven", "--steps", "3"), "steps must be one this model was distilled for"),
        (("seven", "-o", "image.gif"), ".webp"),
        (("seven", "--strength", "0.5"), "--image"),
        (("seven", "--image", "missing.png"), "missing.png cannot be read"),
        (("seven", "--url", "http://127.0.0.1:9"), "is a halfstep server running there?"),
        (("seven", "--url", "127.0.0.1:9"), "is no address of a server"),
        (("seven", "--url", "http://[::1"), "is no address of a server"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    toy_bundle: Path, tmp_path: Path, arguments: tuple[str, ...], told: str
) -> None:
    place = () if "-o" in arguments else ("-o", tmp_path / "out.png")
    result = generate(*arguments, *place, "--bundle", toy_bundle)
    assert result.returncode == 1
    assert told in result.stderr
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
