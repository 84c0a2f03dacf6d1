"""Engines are built in a process of their own, which may fail, be killed, or be told to stop."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from engines.backends.load import engine_key
from engines.bundle import verify_bundle
from engines.errors import BackendError
from server.engine_build import build
from server.settings import Settings
from tests.support.toy_bundle import ToyOptions, make_toy_bundle

pytestmark = pytest.mark.anyio

ENDS = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
BREAKS = "print('half a traceback', end=''); raise SystemExit(3)"
REFUSES = "import json; print(json.dumps({'refused': 'There is no such device.'})); raise SystemExit(1)"
WAITS = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); sys.stdin.read(); time.sleep(120)"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    bundle = make_toy_bundle(tmp_path / "toy", ToyOptions(steps=(1,), default_steps=1)).path
    return Settings(bundles=(bundle,), backend="openvino", threads=1, cache_dir=tmp_path / "cache")


async def test_a_build_fills_the_cache_of_every_graph_and_keeps_no_costs(settings: Settings) -> None:
    await build(settings.model_copy(update={"rungs": (1, 2, 4)}))
    bundle = verify_bundle(settings.bundles[0])
    for graph in bundle.manifest.graphs:
        folder = engine_key(bundle, graph, "openvino", "auto", 1).folder(settings.cache_dir or Path())
        assert [entry.name for entry in folder.iterdir()] == ["models"]
        assert len(list((folder / "models").glob("*.blob"))) == 3


@pytest.mark.parametrize(
    ("script", "said"),
    [
        pytest.param(ENDS, "ended by signal 9", id="killed"),
        pytest.param(BREAKS, "exited with status 3", id="broken"),
        pytest.param(REFUSES, "There is no such device.", id="refused"),
    ],
)
async def test_a_build_that_ends_badly_says_how(settings: Settings, script: str, said: str) -> None:
    with pytest.raises(BackendError, match=said):
        await build(settings, (sys.executable, "-c", script))


async def test_a_build_that_is_not_wanted_any_more_is_killed(settings: Settings, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    building = asyncio.create_task(build(settings, (sys.executable, "-c", WAITS, str(begun))))
    async with asyncio.timeout(60):
        while not begun.exists():  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(0.01)
        building.cancel()
        await asyncio.wait([building])
    assert building.cancelled()


async def test_a_build_without_a_place_for_it_is_refused(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    nowhere = settings.model_copy(update={"cache_dir": tmp_path / "file" / "cache"})
    with pytest.raises(BackendError, match="cannot be written"):
        await build(nowhere)
