"""The bench of real architectures, as far as a machine without a GPU can hold it to what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from engines.backends import load
from engines.backends.base import EngineBackend
from engines.backends.cuda import Device
from engines.errors import BackendError
from tests.gpu import bench, contenders
from tests.gpu.architectures import ARCHITECTURES
from tests.gpu.found import Found, summary

TINY = ARCHITECTURES["tiny"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where graphs are kept from one run to the next."""
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(autouse=True)
def cold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "WARM_S", 0.0)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_graph_that_fails_loses_nothing_else(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_graph(name: str, file: Path, *arguments: Any, **options: Any) -> EngineBackend:
        if file.parent.name == "tiny-decode":
            raise BackendError("no such operator")
        return whole(name, file, *arguments, **options)

    whole = contenders.load_graph
    monkeypatch.setattr(contenders, "load_graph", load_graph)
    with pytest.raises(typer.Exit) as ended:
        bench.main("tiny", ["onnxruntime"], "float32", "1,2", 1, False, ["decode", "decode_tiny"], exported)
    assert ended.value.exit_code == 1
    ceilings, one, decode, _, decode_tiny, everything = lines(capsys)
    assert (ceilings["ceilings"], one["graph"]) == (everything["ceilings"], "decode")
    assert {rung for ms in one["ms"].values() for rung in ms} == {"1"}
    engine, diffusers = "onnxruntime float32", "diffusers eager float32"
    assert (decode["graph"], decode["ms"].keys()) == ("decode", {diffusers})
    assert (decode_tiny["graph"], decode_tiny["ms"].keys()) == ("decode_tiny", {engine, diffusers})
    assert everything["failures"] == {f"decode on {engine}": "BackendError: no such operator"}
    assert everything["ms"][engine] == {"decode_tiny": decode_tiny["ms"][engine]}
    assert everything["ms"][diffusers]["decode"] == decode["ms"][diffusers]
    assert decode["ms"][diffusers].keys() == {"1", "2"}
    assert everything["ceilings"]["matmul_tflop_s"] > 0
    assert everything["device_mb"] is None


def test_what_follows_is_summed_up_of_what_is_there() -> None:
    found = Found("onnxruntime", ceilings={"matmul_tflop_s": 2.0})
    found.ms = {"whole": {"step": {1: 10.0, 4: 20.0}, "decode": {1: 60.0}}, "no step": {"decode": {1: 5.0}}}
    told = summary(found, 10**9)
    assert told["step_fraction"] == {"whole": {1: pytest.approx(0.05), 4: pytest.approx(0.1)}}
    assert told["images_per_s"] == {"whole": {"decode": {1: pytest.approx(10.0)}}}
    found.ceilings = {}
    assert summary(found, 10**9)["step_fraction"] == {}


def test_a_contender_that_fails_at_a_batch_size_keeps_the_smaller_ones() -> None:
    def ready(rung: int) -> bench.Call:
        if rung > 2:
            raise torch.OutOfMemoryError("no room")
        return lambda: None

    found = Found("onnxruntime")
    bench.measure(found, "step", {"small": lambda: ready, "large": lambda: lambda rung: lambda: None}, (1, 4, 8), 1)
    assert found.ms["small"]["step"].keys() == {1}
    assert found.ms["large"]["step"].keys() == {1, 4, 8}
    assert found.failures == {"step on small, 4 rows": "OutOfMemoryError: no room"}


def test_diffusers_runs_a_copy_in_the_precision_asked_for() -> None:
    ready = contenders.diffusers_contender(TINY, "step", "cpu", "bfloat16")["diffusers eager bfloat16"]()
    [network] = ready.args  # type: ignore[attr-defined]
    assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in TINY.network("step").parameters()} == {torch.float32}
    ready(2)()


def test_every_batch_size_is_compiled_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[Any]] = []

    def backend(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        shapes = [size for tensor in inputs if isinstance(tensor, torch.Tensor) for size in tensor.shape]
        seen.append([size for size in (*inputs, *shapes) if isinstance(size, torch.SymInt)])
        return module.forward

    compile_as_told = torch.compile

    def recorded(network: Any, *, mode: str, **options: Any) -> Any:
        return compile_as_told(network, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", recorded)
    [load] = contenders.diffusers_contender(TINY, "decode_tiny", "cpu", "float32", compiled=True).values()
    ready = load()
    for rung in (1, 2, 4):
        ready(rung)()
    assert len(seen) >= 3
    assert not any(seen)


def test_all_that_was_found_is_told_before_anything_is_compiled(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compiling takes minutes a batch size: who ends it has the rest."""

    def compile_forever(network: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "compile", compile_forever)
    with pytest.raises(KeyboardInterrupt):
        bench.main("tiny", ["onnxruntime"], "float32", "1", 1, True, ["step", "decode"], exported)
    everything = lines(capsys)[-1]
    assert everything["images_per_s"].keys() == {"onnxruntime float32", "diffusers eager float32"}
    assert everything["step_fraction"].keys() == everything["images_per_s"].keys()
    assert everything["failures"] == {}


def test_what_an_engine_builds_is_kept_with_the_graphs(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def load_graph(name: str, *arguments: Any, kept: Any, **options: Any) -> EngineBackend:
        asked.append(kept)
        return whole(name, *arguments, kept=kept, **options)

    whole = contenders.load_graph
    monkeypatch.setattr(contenders, "load_graph", load_graph)
    for graph in ("decode", "decode_tiny", "decode"):
        bench.main("tiny", ["openvino", "onnxruntime"], "float32", "1", 1, False, [graph], exported)
    (folder, decode), (_, tiny), (_, again) = asked[::2]
    assert folder == exported
    assert decode == again
    assert decode.graph_sha256 != tiny.graph_sha256
    assert set(asked[1::2]) == {None}, "nothing is built there"
    bench.main("tiny", ["openvino"], "float32", "1", 1, False, ["decode_tiny"], None)
    assert asked[-1] is None


def test_any_backend_is_run_by_its_own_name_on_what_was_exported_before(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    contenders.export(TINY, "tiny", "decode", exported)
    monkeypatch.setattr(contenders, "write_graph", lambda *_: pytest.fail("exported again"))
    bench.main("tiny", ["openvino", "torch"], "float32", "1", 1, False, ["decode"], exported)
    engines = lines(capsys)[-1]["engines"]
    assert {contender: name.split()[0] for contender, name in engines.items()} == {
        "openvino float32": "openvino",
        "torch float32": "torch",
    }


def refused(*words: str) -> tuple[int, str]:
    """Exit code, and what is told on stderr, of a run that is to print no figures."""
    app = typer.Typer()
    app.command()(bench.main)
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    return result.exit_code, result.stderr


def test_no_gpu_is_refused_in_one_sentence_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence is that of tests/unit/engines/test_tensorrt.py."""

    def find_device() -> Device:
        raise BackendError("No NVIDIA GPU is visible to this process: check nvidia-smi")

    monkeypatch.setattr(load, "find_device", find_device)
    code, told = refused("--model", "tiny")
    assert (code, told.splitlines()) == (
        1,
        ["error: No NVIDIA GPU is visible to this process: check nvidia-smi"],
    )


def test_a_precision_that_a_backend_does_not_offer_is_refused() -> None:
    code, told = refused("--model", "tiny", "--backend", "onnxruntime", "--precision", "bfloat16")
    assert code == 1
    assert "runs float32 only; for bfloat16 use --backend" in told


@pytest.mark.parametrize(
    ("option", "value", "known"),
    [
        ("--model", "sd3", "sd15, sdxl, tiny"),
        ("--graph", "encode", "step, decode, decode_tiny"),
        ("--rungs", "1,x", "1,4,8"),
    ],
)
def test_a_wrong_option_is_named_with_what_it_may_be(option: str, value: str, known: str) -> None:
    code, told = refused(option, value)
    assert code == 2
    assert option in told
    assert value in told
    assert known in told
