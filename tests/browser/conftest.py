"""A real Chromium on a real server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.support.serving import ServerProcess, serving

_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
LIMIT_MS = 15_000


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine; install one with: apt-get install chromium")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=_FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="session")
def server(
    toy_bundle: Path, poison_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    with serving([toy_bundle, poison_bundle], log=tmp_path_factory.mktemp("browser") / "log") as process:
        yield process


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def page(request: pytest.FixtureRequest, browser: Browser, server: ServerProcess) -> Iterator[Page]:
    """The playground, its first images drawn; anything it logs as an error, or loads from elsewhere, fails."""
    context = browser.new_context(viewport=request.param, base_url=server.url)
    context.set_default_timeout(LIMIT_MS)
    opened = context.new_page()
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda message: problems.append(message.text) if message.type == "warning" else None)
    opened.on(
        "request", lambda r: None if r.url.startswith((server.url, "data:", "blob:")) else problems.append(r.url)
    )
    opened.goto("/")
    opened.wait_for_selector("#grid .card img")
    yield opened
    context.close()
    assert problems == []
