"""The short fuzz: the same requests at every run, and the server is as well afterwards as before."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.fuzz.__main__ import fuzz
from tests.support.serving import serving


def test_every_answer_is_one_that_the_document_names(toy_bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving([toy_bundle], log=log) as server:
        found = fuzz(server, "quick", tmp_path)
        assert found.returncode == 0, found.stdout
        assert httpx.get(f"{server.url}/readyz", timeout=60).status_code == 200
    assert "request_failed" not in log.read_text()
