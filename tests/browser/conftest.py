"""A real Chromium on a real server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright

from tests.support.serving import ServerProcess, serving

_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP: ViewportSize = {"width": 1280, "height": 900}
PHONE: ViewportSize = {"width": 390, "height": 844}
LIMIT_MS = 30_000

expect.set_options(timeout=LIMIT_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """For one module: Playwright keeps an event loop running, in which no other test could start its own."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine; install one with: apt-get install chromium")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=_FLAGS)
        yield running
        running.close()


@pytest.fixture(scope="session")
def server(
    toy_bundle: Path, poison_bundle: Path, sized_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    bundles = [toy_bundle, poison_bundle, sized_bundle]
    with serving(bundles, log=tmp_path_factory.mktemp("browser") / "log") as process:
        yield process


@contextmanager
def playground(browser: Browser, url: str, viewport: ViewportSize) -> Iterator[Page]:
    """The playground, its first images drawn; anything it logs as an error, or loads from elsewhere, fails."""
    context = browser.new_context(viewport=viewport, base_url=url)
    context.set_default_timeout(LIMIT_MS)
    opened = context.new_page()
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda message: problems.append(message.text) if message.type == "warning" else None)
    opened.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else problems.append(r.url))
    opened.goto("/")
    opened.wait_for_selector("#grid .card img")
    yield opened
    context.close()
    assert problems == []


@pytest.fixture
def page(browser: Browser, server: ServerProcess) -> Iterator[Page]:
    """On a desktop."""
    with playground(browser, server.url, DESKTOP) as opened:
        yield opened


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def any_page(request: pytest.FixtureRequest, browser: Browser, server: ServerProcess) -> Iterator[Page]:
    """On a desktop, then on a phone: for what the layout may break."""
    with playground(browser, server.url, request.param) as opened:
        yield opened
