"""The proof at true size, rehearsed with networks of milliseconds; and what it calls a failure."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.true_size.__main__ import BOUNDS, STAGES, main, missed


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
    assert all(stages[stage]["errors"].keys() >= {"condition", "image", "encoded"} for stage in BOUNDS)


def test_too_much_memory_is_a_failure() -> None:
    assert missed({"make": {"own_gib": 23.9}}) == []
    assert missed({"make": {"own_gib": 24.1}}) == ["make took 24.1 GiB"]


@pytest.mark.parametrize(
    ("stage", "values", "levels"), [("openvino float32", 1e-3, 1), ("openvino bfloat16", 0.06, 16)]
)
def test_too_large_a_difference_is_a_failure_in_every_precision(stage: str, values: float, levels: int) -> None:
    def found(part: str, largest: float, relative: float) -> list[str]:
        error = {"largest": largest, "relative": relative, "rms": relative}
        return missed({stage: {"own_gib": 1.0, "errors": {part: error}}})

    assert found("condition", 5.0, 0.9 * values) == []
    assert found("image", levels, 1.0) == []
    for part, largest, relative in (
        ("condition", 0.0, 1.1 * values),
        ("condition", 0.0, float("nan")),
        ("image", levels + 1, 0.0),
    ):
        [failure] = found(part, largest, relative)
        assert failure.startswith(f"{stage}: {part} differs from diffusers")
