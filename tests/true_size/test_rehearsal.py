"""The proof at true size, rehearsed with networks of milliseconds; and what it calls a failure."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.true_size.__main__ import STAGES, main, missed


@pytest.mark.long
def test_every_stage_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    monkeypatch.setattr(sys, "argv", ["true_size", "--model", "tiny", "--work", str(tmp_path)])
    assert main() == 0
    stages = json.loads(capfd.readouterr().out.splitlines()[-1])["stages"]
    assert tuple(stages) == STAGES
    assert all(figures["peak_gib"] > figures["own_gib"] > 0 for figures in stages.values())
    assert stages["import"]["parity"].keys() == stages["tensorrt bfloat16"]["graphs"].keys()
    assert stages["openvino bfloat16"]["errors"]["image"]["relative"] < 0.1


def test_too_much_memory_and_too_large_a_difference_are_failures() -> None:
    def error(relative: float) -> dict[str, float]:
        return {"largest": 1.0, "relative": relative, "rms": relative}

    fine = {"own_gib": 1.0, "errors": {"condition": error(1e-4), "image": error(1 / 255)}}
    assert missed({"make": {"own_gib": 23.9}, "openvino float32": fine}) == []
    assert missed({"make": {"own_gib": 24.1}}) == ["make took 24.1 GiB"]
    for part, relative in (("condition", 2e-3), ("image", 2 / 255), ("condition", float("nan"))):
        [failure] = missed({"openvino float32": {"own_gib": 1.0, "errors": {part: error(relative)}}})
        assert failure.startswith(f"{part} differs from diffusers")
