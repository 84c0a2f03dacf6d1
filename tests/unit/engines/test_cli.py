"""The command line: verify, build, bench, compare."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from engines.backends.base import Rows
from engines.backends.onnxruntime import OnnxRuntimeBackend
from engines.bench import BenchResult, Throughput
from engines.bundle import Bundle
from engines.cli import app
from engines.compare import Difference, compare_backends
from engines.cost import COST_FILE
from engines.errors import BackendError
from engines.tables import throughput_table

FAST = ["--rungs", "1,2", "--repeats", "1"]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_verify_names_what_the_bundle_holds(toy: Bundle) -> None:
    result = run("verify", toy.path)
    assert result.exit_code == 0
    assert "toy-digits: 8 files" in result.stdout
    assert "guidance_scale 1 to 5" in result.stdout
    assert "decoder: own" in result.stdout


@pytest.mark.parametrize("command", ["verify", "build", "bench", "compare"])
def test_a_bad_bundle_is_one_sentence_and_exit_1(command: str, tmp_path: Path) -> None:
    result = run(command, tmp_path)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "has no manifest.json; write one with" in result.stderr
    assert "Traceback" not in result.output


def test_what_the_disk_refuses_is_one_sentence_too(toy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/b/manifest.json")

    monkeypatch.setattr("engines.cli.verify_bundle", refused)
    result = run("verify", toy.path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: Permission denied: /b/manifest.json\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_every_default(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300"})
    assert result.exit_code == 0
    lines = {words[1]: line for line in result.stdout.splitlines() if len(words := line.split()) > 1}
    for option in COMMANDS[command].params:
        said = option.show_default if isinstance(option.show_default, str) else option.default
        if said is not None:
            assert re.search(rf"\[default: \(?{re.escape(str(said))}\)?\]", lines[option.opts[0]]), option.opts


@pytest.mark.parametrize(
    "arguments", [["build"], ["bench", ".", "--rungs", "0"], ["bench", ".", "--rungs", "a,b"], ["x"]]
)
def test_wrong_usage_is_exit_2(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_build_fills_the_cache(toy: Bundle, tmp_path: Path) -> None:
    result = run("build", toy.path, "--backend", "openvino", "--cache", tmp_path, *FAST)
    assert result.exit_code == 0, result.output
    assert len(list(tmp_path.glob(f"*/{COST_FILE}"))) == len(toy.manifest.graphs)
    assert len(list(tmp_path.glob("*/models/*.blob"))) == 2 * len(toy.manifest.graphs)
    assert "step_4" in result.stdout


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_build_into_a_cache_that_cannot_be_written_is_refused_at_once(
    toy: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr("engines.cli.load_pipeline", lambda *_, **__: pytest.fail("compiled first"))
    (tmp_path / "file").touch()
    result = run("build", toy.path, "--backend", backend, "--cache", tmp_path / "file" / "cache", *FAST)
    assert result.exit_code == 1
    [sentence] = result.stderr.splitlines()
    assert sentence.startswith(f"error: nothing can be kept in {tmp_path}/file/cache: ")
    assert sentence.endswith("; choose another cache")


@pytest.mark.parametrize("command", ["build", "bench"])
@pytest.mark.parametrize("fails", [False, True], ids=["works", "fails"])
def test_commands_close_the_pipeline_however_they_end(
    toy: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, fails: bool
) -> None:
    class Watched(OnnxRuntimeBackend):
        open_now = 0

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            Watched.open_now += 1

        def run(self, rows: Rows) -> dict[str, NDArray[Any]]:
            if fails:
                raise BackendError("out of memory")
            return super().run(rows)

        def close(self) -> None:
            super().close()
            Watched.open_now -= 1

    monkeypatch.setattr("engines.backends.onnxruntime.OnnxRuntimeBackend", Watched)
    monkeypatch.setattr("engines.cli.matmul_ceiling", lambda *_: 1.0)
    where = ["--cache", tmp_path] if command == "build" else []
    result = run(command, toy.path, "--backend", "onnxruntime", *where, *FAST)
    assert result.exit_code == int(fails), result.output
    assert Watched.open_now == 0


def test_bench_ends_with_one_json_line(toy: Bundle) -> None:
    result = run("bench", toy.path, "--backend", "onnxruntime", *FAST)
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["ms"].keys() == toy.manifest.graphs.keys()
    assert figures["ms"]["step_4"].keys() == {"1", "2"}
    assert figures["engine"].startswith("onnxruntime ")
    assert {"machine", "python", "numpy", "command", "repeats"} <= figures.keys()
    assert figures["host_memory_mb"] > 0
    assert figures["device_memory_mb"] is None
    assert figures["generate"]["images_per_s"] > 0
    assert figures["flop"]["step_4"] > figures["flop"]["condition"]
    step_s = figures["ms"]["step_4"]["2"] / 1e3
    reached = 2 * figures["flop"]["step_4"] / step_s / (1e9 * figures["ceiling_gflop_s"])
    assert figures["fraction"]["step_4"]["2"] == pytest.approx(reached)


def test_slow_models_have_images_per_second_too() -> None:
    slow = Throughput(steps=2, sampler="deterministic", batch=1, images_per_s=0.00413)
    result = BenchResult.model_construct(
        throughput=(slow,), generate=slow, host_memory_mb=8e3, device_memory_mb=9e3
    )
    table = throughput_table(result)
    [*_, rates] = table.columns
    assert list(rates.cells) == ["0.00413", "0.00413"]
    assert table.title == "condition, steps and decode; 8000 MB resident, 9000 MB of the GPU's"


def test_compare_accepts_the_toy_on_every_backend(toy: Bundle) -> None:
    result = run("compare", toy.path, "--rows", 4)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("openvino") == len(toy.manifest.graphs)


def test_compare_in_a_precision_that_no_backend_here_offers_is_refused(toy: Bundle) -> None:
    result = run("compare", toy.path, "--precision", "float16")
    assert result.exit_code == 1
    assert "for float16 use --backend tensorrt, torch-cuda, torch-inductor" in result.stderr


def test_compare_above_tolerance_is_exit_1(toy: Bundle) -> None:
    result = run("compare", toy.path, "--backend", "openvino", "--rows", 4, "--tolerance", 0)
    assert result.exit_code == 1
    assert "fails on graph '" in result.stderr
    assert "pass a --tolerance you accept" in result.stderr


def test_rows_that_depend_on_their_batch_are_told_from_what_a_tolerance_allows(
    toy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    wavering = difference(rows_equal=False, row_error=1e-6)
    monkeypatch.setattr("engines.cli.compare_backends", lambda *_: [wavering])
    result = run("compare", toy.path)
    assert result.exit_code == 1
    assert "engine fails on graph 'step_4': rows have other bytes in other batches" in result.stderr
    assert "you accept" not in result.stderr


def test_rows_on_a_gpu_may_differ_by_what_a_tolerance_allows(toy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    wavering = difference(rows_equal=False, row_error=0.03, on_gpu=True)
    monkeypatch.setattr("engines.cli.compare_backends", lambda *_: [wavering])
    result = run("compare", toy.path, "--tolerance", 0.05)
    assert result.exit_code == 0, result.output
    assert "NO: 0.03" in result.stdout
    result = run("compare", toy.path, "--tolerance", 0.02)
    assert result.exit_code == 1
    assert "pass a --tolerance you accept" in result.stderr


def test_compare_tells_how_far_rows_differ_and_asks_for_bits_of_cpus_alone(
    toy: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine whose rows depend on how many they are, taken for one of each kind."""

    class Wavering(OnnxRuntimeBackend):
        def run(self, rows: Rows) -> dict[str, NDArray[Any]]:
            out, count = super().run(rows), len(next(iter(rows.values())))
            if "next_latent" in out and count == 1:
                out["next_latent"] = out["next_latent"] + np.float32(0.25)
            return out

    loaded = []

    def load(name: str, bundle: Bundle, graph: str, **options: Any) -> OnnxRuntimeBackend:
        kind = OnnxRuntimeBackend if name == "onnxruntime" else Wavering
        loaded.append((name, options.get("rungs")))
        return kind(bundle.graph_file(graph), bundle.manifest.graphs[graph])

    monkeypatch.setattr("engines.compare.load_backend", load)
    for backend, on_gpu in (("torch", False), ("torch-cuda", True)):
        found = {d.call: d for d in compare_backends(toy, [backend], "auto", 4, 0, rungs=(1, 4))}
        assert (backend, (1, 4)) in loaded
        step = found["step_4"]
        assert (step.rows_equal, step.on_gpu) == (False, on_gpu)
        assert step.row_error == pytest.approx(0.25, rel=1e-3)
        assert step.within(0.3) == on_gpu
        assert not step.within(0.2)
        assert (found["condition"].rows_equal, found["condition"].row_error) == (True, 0.0)


def test_compare_hands_its_batch_sizes_on(toy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []

    def compare(*arguments: object) -> list[Difference]:
        given.extend(arguments)
        return []

    monkeypatch.setattr("engines.cli.compare_backends", compare)
    assert run("compare", toy.path, "--rungs", "4,1").exit_code == 0
    assert given[-1] == (1, 4)
    assert run("compare", toy.path, "--rungs", "0").exit_code == 2


def test_compare_takes_compiled_models_from_a_cache_that_is_named(toy: Bundle, tmp_path: Path) -> None:
    arguments = ["compare", toy.path, "--backend", "openvino", "--rows", 2]
    assert run(*arguments, "--cache", tmp_path / "cache").exit_code == 0
    compiled = {blob: blob.stat().st_mtime_ns for blob in tmp_path.glob("cache/*/models/*.blob")}
    assert compiled
    assert run(*arguments, "--cache", tmp_path / "cache").exit_code == 0
    assert {blob: blob.stat().st_mtime_ns for blob in tmp_path.glob("cache/*/models/*.blob")} == compiled


def difference(
    error: float = 0.0,
    *,
    rows_equal: bool = True,
    row_error: float = 0.0,
    levels: bool = False,
    on_gpu: bool = False,
) -> Difference:
    return Difference("step_4", "engine", error, error, rows_equal, row_error, levels, on_gpu)


def test_a_difference_passes_only_with_equal_rows_and_one_level_at_most() -> None:
    assert difference(0.5).within(0.5)
    assert not difference(0.5).within(0.4)
    assert difference(1.0, levels=True).within(0.0)
    assert not difference(2.0, levels=True).within(0.0)
    assert not difference(rows_equal=False, row_error=1e-6).within(1.0)


def test_on_a_gpu_rows_count_as_errors_do() -> None:
    rows = partial(difference, rows_equal=False, on_gpu=True)
    assert rows(row_error=0.5).within(0.5)
    assert not rows(row_error=0.5).within(0.4)
    assert not rows(0.5, row_error=0.1).within(0.4)
    assert rows(row_error=1.0, levels=True).within(0.0)
    assert not rows(row_error=2.0, levels=True).within(0.0)
    assert not rows(row_error=math.nan).within(1.0)


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "engines", "verify", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert (
        done.stderr.strip()
        == f"error: {tmp_path}/nowhere is not a folder; a bundle is a folder with a manifest.json"
    )
