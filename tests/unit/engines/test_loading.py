"""Choosing and loading backends, and what is said when one is not there."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from engines.backends import load
from engines.backends.base import Precision
from engines.backends.load import (
    BACKENDS,
    BUILDERS,
    BackendName,
    choose_backend,
    choose_precision,
    engine_key,
    graph_precision,
    load_backend,
    source_sha256,
)
from engines.bundle import Bundle, file_records, verify_bundle, write_bundle
from engines.errors import BackendError
from engines.manifest import MANIFEST_NAME, SEAL_NAME, Parity


def uninstall(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    def find_spec(name: str) -> object:
        return None if name in missing else importlib.util.find_spec(name)

    monkeypatch.setattr(load, "find_spec", find_spec)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("openvino", r"pip install -e \. \(in the checkout\)$"),
        ("onnxruntime", r"pip install -e '\.\[onnxruntime\]' \(in the checkout\)$"),
        ("torch", r"pip install -e '\.\[torch\]' \(in the checkout\)$"),
    ],
)
def test_a_missing_library_says_what_to_install(
    toy: Bundle, monkeypatch: pytest.MonkeyPatch, name: str, command: str
) -> None:
    uninstall(monkeypatch, name)
    with pytest.raises(BackendError, match=f"The {name} backend needs {name}; install it with: {command}"):
        load_backend(name, toy, "decode")


def test_auto_is_the_fastest_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("auto") == "openvino"
    uninstall(monkeypatch, "openvino")
    assert choose_backend("auto") == "onnxruntime"
    uninstall(monkeypatch, *BACKENDS)
    with pytest.raises(BackendError, match="No backend is installed"):
        choose_backend("auto")


def test_other_names_are_refused() -> None:
    with pytest.raises(BackendError, match=r"no backend 'tenflow'; choose auto, openvino, .*torch-cuda"):
        choose_backend("tenflow")


@pytest.mark.parametrize(
    ("precision", "lowering", "others"),
    [
        ("bfloat16", ["openvino", "tensorrt", "torch-cuda", "torch-inductor"], ["onnxruntime", "torch"]),
        ("float16", ["tensorrt", "torch-cuda", "torch-inductor"], ["openvino", "onnxruntime", "torch"]),
    ],
)
def test_16_bits_are_for_backends_that_offer_them(
    precision: Precision, lowering: list[BackendName], others: list[BackendName]
) -> None:
    assert [choose_precision(name, precision) for name in lowering] == [precision] * len(lowering)
    for name in others:
        said = f"The {name} backend runs float32.* only; for {precision} use --backend {', '.join(lowering)}"
        with pytest.raises(BackendError, match=said):
            choose_precision(name, precision)
        assert choose_precision(name, "auto") == "float32"


def test_a_graph_that_overflows_in_float16_runs_in_bfloat16(toy: Bundle) -> None:
    spec, parity = toy.manifest.graphs["decode"], Parity(reference="", max_abs_error=0, mean_abs_error=0, rows=1)
    holds = spec.model_copy(update={"lowered": {"bfloat16": parity, "float16": parity}})
    overflows = spec.model_copy(update={"lowered": {"bfloat16": parity, "float16": None}})
    assert [graph_precision(holds, p) for p in ("float32", "bfloat16", "float16")] == [
        "float32",
        "bfloat16",
        "float16",
    ]
    assert graph_precision(overflows, "float16") == "bfloat16"
    assert graph_precision(overflows, "float32") == "float32"


def test_float16_of_a_bundle_that_does_not_say_whether_it_overflows_is_refused(toy: Bundle) -> None:
    with pytest.raises(
        BackendError, match=r"does not say whether decode\.onnx overflows in float16: export it again"
    ):
        graph_precision(toy.manifest.graphs["decode"], "float16")


def test_opening_on_openvino_imports_neither_torch_nor_onnxruntime(toy: Bundle) -> None:
    script = (
        "import sys; from pathlib import Path; from engines.open import open_pipeline;"
        f"open_pipeline(Path({str(toy.path)!r}), 'openvino', rungs=(1,));"
        "print(sorted({'torch', 'onnxruntime', 'diffusers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_opening_connects_nowhere_and_writes_nothing(toy: Bundle, tmp_path: Path, backend: str) -> None:
    script = (
        "import sys; events = [];"
        "sys.addaudithook(lambda name, args: events.append(name)"
        " if name in {'socket.connect', 'socket.getaddrinfo', 'subprocess.Popen'} else None);"
        "from pathlib import Path; from engines.open import open_pipeline;"
        f"open_pipeline(Path({str(toy.path)!r}), {backend!r}, rungs=(1,)); print(events)"
    )
    environment = {**os.environ, "HOME": str(tmp_path)}
    for name in ("CI", "GITHUB_ACTIONS", "ORT_DISABLE_TELEMETRY"):  # libraries that report are silent in these
        environment.pop(name, None)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"
    assert list(tmp_path.iterdir()) == []


def test_names_tell_backend_version_and_precision(toy: Bundle) -> None:
    for name in BACKENDS:
        backend, version, precision = load_backend(name, toy, "decode").name.split()
        assert (backend, precision) == (name, "float32")
        assert version[0].isdigit()


def weights_beside(toy: Bundle, destination: Path, scale: float) -> Bundle:
    """The toy bundle with a step graph whose weights, ``scale`` times as large, are in a file of their own."""
    staging = Path(shutil.copytree(toy.path, destination.with_name(f"{destination.name}.staging")))
    model = onnx.load(str(staging / "step_4.onnx"))
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array((values * scale).astype(values.dtype), tensor.name))
    file = str(staging / "step_4.onnx")
    onnx.save_model(model, file, save_as_external_data=True, location="step_4.data", size_threshold=0)
    for name in (MANIFEST_NAME, SEAL_NAME):
        (staging / name).unlink()
    return write_bundle(staging, destination, toy.manifest.model_copy(update={"files": file_records(staging)}))


def test_an_engine_of_other_weights_has_another_key(toy: Bundle, tmp_path: Path) -> None:
    one, two = (weights_beside(toy, tmp_path / f"times-{scale}", scale) for scale in (1, 2))
    assert one.graph_file("step_4").read_bytes() == two.graph_file("step_4").read_bytes()
    bundles = toy, one, two, verify_bundle(two.path)
    keys = [engine_key(bundle, "step_4", "openvino", "auto", 0) for bundle in bundles]
    assert len(set(keys)) == 3
    assert keys[2] == keys[3]
    same = [engine_key(bundle, "decode", "openvino", "auto", 0) for bundle in bundles]
    assert len(set(same)) == 1


@pytest.mark.parametrize(("backend", "changed"), [(b, name) for b, names in BUILDERS.items() for name in names])
def test_code_that_builds_otherwise_has_another_hash(tmp_path: Path, backend: str, changed: str) -> None:
    for name in BUILDERS[backend]:
        shutil.copy(Path(load.__file__).with_name(name), tmp_path)
    assert source_sha256(backend, tmp_path) == source_sha256(backend)
    with (tmp_path / changed).open("a") as file:
        file.write("OPSET = 23\n")
    assert source_sha256(backend, tmp_path) != source_sha256(backend)
