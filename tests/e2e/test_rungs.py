"""A server runs the batch sizes it was told, on the engines that were built for them."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import httpx
import numpy as np
from PIL import Image
from typer.testing import CliRunner

from engines.cli import app
from engines.cost import COST_FILE
from engines.open import open_pipeline
from tests.support.serving import serving

ON = ("--backend", "openvino", "--threads", "1", "--rungs", "1,2")


def test_a_server_takes_up_what_was_built_for_its_rungs_and_runs_no_other(toy_bundle: Path, tmp_path: Path) -> None:
    def kept() -> dict[Path, int]:
        files = [*cache.glob("*/models/*.blob"), *cache.glob(f"*/{COST_FILE}")]
        return {file: file.stat().st_mtime_ns for file in files}

    cache = tmp_path / "cache"
    built = CliRunner().invoke(app, ["build", str(toy_bundle), *ON, "--repeats", "1", "--cache", str(cache)])
    assert built.exit_code == 0, built.output
    before = kept()
    flags = [*ON, "--cache-dir", str(cache), "--isolate-engine"]
    with serving([toy_bundle], *flags, log=tmp_path / "stderr.log") as server:
        body = {"prompt": "seven", "n": 3, "seed": 1, "guidance_scale": 2.0, "steps": 4}
        answer = httpx.post(f"{server.url}/v1/images/generations", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        metrics = httpx.get(f"{server.url}/metrics", timeout=60).text
    assert kept() == before
    rungs = set(re.findall(r'halfstep_step_seconds_count\{.*rung="(\d+)"', metrics))
    assert rungs
    assert rungs <= {"1", "2"}  # which of them costs less a row is the machine's to say
    alone = open_pipeline(toy_bundle, "openvino", threads=1, rungs=(1,), warm=False)
    for seed, entry in zip((1, 2, 3), answer.json()["data"], strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["b64_json"]))))
        np.testing.assert_array_equal(pixels, alone.generate(["seven"], 2.0, [seed], 4)[0])
