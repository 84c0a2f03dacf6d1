"""The TensorRT backend without a GPU: refused with the reason, and no kept plan is run by mistake."""

from __future__ import annotations

import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from engines.backends import cuda, load, tensorrt, tensorrt_build
from engines.backends.cuda import Device, find_device
from engines.backends.load import engine_key, load_backend, source_sha256
from engines.backends.plan_store import PlanStore
from engines.bundle import Bundle
from engines.cli import app
from engines.device_memory import DeviceMemory
from engines.errors import BackendError, OutOfMemoryError
from server.loading import load_pipelines
from server.settings import Settings
from tests.support.step_rows import step_spec

H100 = Device("NVIDIA H100 80GB HBM3", (9, 0), "580.65.06")
RTX = Device("NVIDIA GeForce RTX 4090", (8, 9), "580.65.06")


def fake_library(name: str = "tensorrt", version: str = "11.4.0.106") -> ModuleType:
    module = ModuleType(name)
    module.__version__ = version  # type: ignore[attr-defined]
    module.ComputeCapability = SimpleNamespace(SM89=0)  # type: ignore[attr-defined]
    return module


def install(monkeypatch: pytest.MonkeyPatch, module: ModuleType, device: Device = H100) -> None:
    monkeypatch.setattr(tensorrt, "find_library", lambda: module)
    for place in (tensorrt, load):
        monkeypatch.setattr(place, "find_device", lambda: device)


# ---- refusals


def test_no_library_says_which_to_install(toy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_build, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"pip install -e '\.\[trt\]'.*pip install -e '\.\[rtx\]'"):
        load_backend("tensorrt", toy, "decode")


def test_a_library_that_does_not_load_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> ModuleType:
        raise OSError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr(tensorrt_build, "find_spec", lambda name: name)
    monkeypatch.setattr(tensorrt_build, "import_module", fails)
    with pytest.raises(BackendError, match=r"tensorrt is installed but does not load: libnvinfer\.so\.11"):
        tensorrt_build.find_library()


def test_full_tensorrt_goes_before_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_build, "find_spec", lambda name: name)
    monkeypatch.setattr(tensorrt_build, "import_module", fake_library)
    assert tensorrt_build.library_name(tensorrt_build.find_library()) == "tensorrt 11.4.0.106"
    assert tensorrt_build.library_name(fake_library("tensorrt_rtx", "1.7.1.116")) == "tensorrt-rtx 1.7.1.116"


def torch_with(cuda_version: str | None, available: bool) -> SimpleNamespace:
    return SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(cuda=cuda_version),
        cuda=SimpleNamespace(
            is_available=lambda: available,
            get_device_name=lambda: "NVIDIA H100 80GB HBM3",
            get_device_capability=lambda: (9, 0),
        ),
        _C=SimpleNamespace(_cuda_getDriverVersion=lambda: 13000),
    )


@pytest.mark.parametrize(
    ("cuda_version", "message"),
    [(None, "torch 2.13.0 is a build without CUDA"), ("13.0", "No NVIDIA GPU is visible to this process")],
)
def test_no_gpu_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, cuda_version: str | None, message: str
) -> None:
    monkeypatch.setattr(cuda, "import_module", lambda name: torch_with(cuda_version, available=False))
    with pytest.raises(BackendError, match=f"{message}.*--backend openvino"):
        find_device()


def test_a_driver_older_than_torch_is_told_from_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = torch_with("13.0", available=False)
    torch._C._cuda_getDriverVersion = lambda: 12040
    monkeypatch.setattr(cuda, "import_module", lambda name: torch)
    with pytest.raises(BackendError, match=r"driver speaks CUDA 12\.4, torch 2\.13\.0 is built for CUDA 13\.0: .*"):
        find_device()
    for spoken in (0, 13010):
        torch._C._cuda_getDriverVersion = lambda spoken=spoken: spoken
        with pytest.raises(BackendError, match="No NVIDIA GPU is visible"):
            find_device()


def test_no_torch_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"pip install -e '\.\[torch\]'"):
        find_device()


NVRM = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC version: 12\n"


@pytest.mark.parametrize(("told", "driver"), [(NVRM, "580.65.06"), ("", "of CUDA 13000"), (None, "of CUDA 13000")])
def test_a_device_is_its_product_architecture_and_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: str | None, driver: str
) -> None:
    file = tmp_path / "version"
    if told is not None:
        file.write_text(told)
    monkeypatch.setattr(cuda, "_DRIVER_FILE", file)
    monkeypatch.setattr(cuda, "import_module", lambda name: torch_with("13.0", available=True))
    assert str(find_device()) == f"NVIDIA H100 80GB HBM3 sm_90, driver {driver}"


def test_memory_of_a_gpu_is_what_the_device_has_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = torch_with("13.0", available=True)
    free, reserve = 70_000_000_000, 2_000_000_000

    def empty_cache() -> None:
        nonlocal free, reserve
        free, reserve = free + reserve, 0

    torch.cuda.empty_cache = empty_cache
    torch.cuda.mem_get_info = lambda: (free, 80_000_000_000)
    monkeypatch.setattr(cuda, "import_module", lambda name: torch)
    memory = DeviceMemory("tensorrt")
    free, reserve = free - 6_000_000_000, 1_000_000_000  # 5 GB by an engine, and what torch caches
    assert memory.taken_mb() == 5000
    assert DeviceMemory("onnxruntime").taken_mb() is None


def test_a_gpu_that_the_library_does_not_know_is_refused() -> None:
    rtx = fake_library("tensorrt_rtx", "1.7.1.116")
    tensorrt_build.check_target(rtx, RTX)
    tensorrt_build.check_target(fake_library(), H100)
    with pytest.raises(BackendError, match=r"no engines for NVIDIA H100 80GB HBM3 \(sm_90\); install full"):
        tensorrt_build.check_target(rtx, H100)


@pytest.mark.parametrize("command", ["build", "bench", "compare"])
def test_commands_refuse_in_one_sentence(
    toy: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    install(monkeypatch, fake_library())

    def refuse() -> Device:
        raise BackendError("No NVIDIA GPU is visible to this process")

    for place in (tensorrt, load, cuda):
        monkeypatch.setattr(place, "find_device", refuse)
    where = ["--cache", str(tmp_path)] if command == "build" else []
    result = CliRunner().invoke(app, [command, str(toy.path), "--backend", "tensorrt", *where])
    assert (result.exit_code, result.stderr.strip()) == (1, "error: No NVIDIA GPU is visible to this process")


def test_threads_are_refused(toy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake_library())
    with pytest.raises(BackendError, match="no CPU threads to set"):
        load_backend("tensorrt", toy, "decode", threads=2)


# ---- what an engine depends on


def test_the_key_changes_with_all_that_a_plan_depends_on(
    toy: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machines = [
        (fake_library(), H100),
        (fake_library(version="11.4.1.10"), H100),
        (fake_library("tensorrt_rtx", "11.4.0.106"), H100),
        (fake_library(), Device("NVIDIA H200", (9, 0), "580.65.06")),
        (fake_library(), Device("NVIDIA H100 80GB HBM3", (9, 0), "590.10")),
    ]
    keys = []
    for library, device in machines:
        install(monkeypatch, library, device)
        keys += [engine_key(toy, "step_4", "tensorrt", precision, 0) for precision in ("float32", "bfloat16")]
    assert len({key.folder(tmp_path) for key in keys}) == 2 * len(machines)
    assert keys[0].machine == "NVIDIA H100 80GB HBM3 sm_90, driver 580.65.06"
    assert keys[0].engine == "tensorrt 11.4.0.106 float32"
    assert {key.source for key in keys} == {source_sha256("tensorrt")}
    assert engine_key(toy, "step_4", "onnxruntime", "auto", 0).source == ""


def test_a_release_that_builds_otherwise_builds_again(
    toy: Bundle, tmp_path: Path, gpu: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(toy, tmp_path)
    monkeypatch.setattr(load, "source_sha256", lambda _: "e" * 64)
    start(toy, tmp_path)
    assert gpu.loaded == [b"plan 1", b"plan 2"]


class FakeRun:
    """Stands for the module that imports torch: a plan is loaded by looking at it."""

    def __init__(self) -> None:
        self.loaded: list[bytes] = []
        self.LoadedPlan = SimpleNamespace(open=self.open)

    def open(self, trt: Any, plan: bytes, *_: Any) -> SimpleNamespace:
        self.loaded.append(plan)
        calls = {"run": lambda rows: {}, "release": lambda: None, "close": lambda: None}
        return SimpleNamespace(**calls, captured={1: True, 2: False})


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    """A machine with an H100 and full TensorRT, as far as loading goes; its plans are b"plan 1", b"plan 2" …"""
    install(monkeypatch, fake_library())
    run, plans = FakeRun(), (f"plan {i}".encode() for i in range(1, 100))
    monkeypatch.setitem(sys.modules, "engines.backends.tensorrt_run", run)
    monkeypatch.setattr(tensorrt, "build_plan", lambda *_: next(plans))
    return run


def kept_plan(toy: Bundle, cache: Path) -> Path:
    key = engine_key(toy, "step_4", "tensorrt", "auto", 0)
    return PlanStore(cache, key, (1, 2)).file("plan")


def start(toy: Bundle, cache: Path) -> None:
    load_backend("tensorrt", toy, "step_4", cache_dir=cache, rungs=(2, 1)).close()


def test_a_second_start_loads_what_the_first_built(toy: Bundle, tmp_path: Path, gpu: FakeRun) -> None:
    start(toy, tmp_path)
    start(toy, tmp_path)
    assert gpu.loaded == [b"plan 1", b"plan 1"]


def test_a_corrupted_engine_is_built_again_and_never_run(toy: Bundle, tmp_path: Path, gpu: FakeRun) -> None:
    start(toy, tmp_path)
    file = kept_plan(toy, tmp_path)
    file.write_bytes(file.read_bytes().replace(b"plan 1", b"plan X"))
    start(toy, tmp_path)
    assert gpu.loaded == [b"plan 1", b"plan 2"]


def test_an_engine_of_another_gpu_is_built_again_and_never_run(
    toy: Bundle, tmp_path: Path, gpu: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(toy, tmp_path)
    theirs = kept_plan(toy, tmp_path)
    install(monkeypatch, fake_library(), Device("NVIDIA H200", (9, 0), "580.65.06"))
    kept_plan(toy, tmp_path).parent.mkdir(parents=True)
    kept_plan(toy, tmp_path).write_bytes(theirs.read_bytes())
    start(toy, tmp_path)
    assert gpu.loaded == [b"plan 1", b"plan 2"]


def test_a_server_loads_the_plans_that_were_built_for_its_rungs(toy: Bundle, tmp_path: Path, gpu: FakeRun) -> None:
    words = ["build", str(toy.path), "--backend", "tensorrt", "--rungs", "1,2", "--repeats", "1"]
    assert CliRunner().invoke(app, [*words, "--cache", str(tmp_path)]).exit_code == 0
    built, costs = list(gpu.loaded), {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/cost.json")}
    assert len(built) == len(costs) == len(toy.manifest.graphs)
    settings = Settings(bundles=(toy.path,), backend="tensorrt", rungs=(1, 2), cache_dir=tmp_path)
    load_pipelines(settings)
    assert gpu.loaded == built + built
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/cost.json")} == costs
    load_pipelines(settings.model_copy(update={"rungs": (1,)}))
    assert set(gpu.loaded[2 * len(built) :]).isdisjoint(built)


def test_without_a_cache_nothing_is_kept(toy: Bundle, gpu: FakeRun) -> None:
    for _ in range(2):
        load_backend("tensorrt", toy, "step_4").close()
    assert gpu.loaded == [b"plan 1", b"plan 2"]


def test_a_closed_engine_says_so(toy: Bundle, gpu: FakeRun) -> None:
    engine = load_backend("tensorrt", toy, "step_4")
    assert engine.name == "tensorrt 11.4.0.106 float32"
    engine.close()
    engine.close()
    with pytest.raises(BackendError, match="load it again"):
        engine.run({})


def test_a_closed_plan_gives_its_scratch_memory_back_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from engines.backends import tensorrt_run

    scratch = [torch.empty(64, dtype=torch.uint8)]
    kept = weakref.ref(scratch[0])
    monkeypatch.setattr(tensorrt_run, "torch", SimpleNamespace(empty=lambda *_, **__: scratch.pop(), uint8=None))
    monkeypatch.setattr(tensorrt_run, "Ladder", partial(tensorrt_run.Ladder, device="cpu"))
    engine = SimpleNamespace(device_memory_size_v2=64)
    plan = tensorrt_run.LoadedPlan(fake_library(), None, engine, step_spec(Path("step.onnx")), (1,), (), None)
    assert kept() is not None
    plan.close()
    assert kept() is None


def test_a_plan_without_scratch_memory_names_its_batch_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from engines.backends import tensorrt_run

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    errors = torch.OutOfMemoryError
    monkeypatch.setattr(tensorrt_run, "torch", SimpleNamespace(empty=full, uint8=None, OutOfMemoryError=errors))
    engine, spec = SimpleNamespace(device_memory_size_v2=2_000_000), step_spec(Path("step.onnx"))
    with pytest.raises(OutOfMemoryError, match=r"step\.onnx for 32 rows takes 2 MB .* give smaller --rungs"):
        tensorrt_run.LoadedPlan(fake_library(), None, engine, spec, (1, 32), (), None)


def test_an_engine_says_what_does_not_fit_by_its_type(toy: Bundle, gpu: FakeRun) -> None:
    engine: Any = load_backend("tensorrt", toy, "step_4")
    for error in (OutOfMemoryError("no memory for 4 rows"), BackendError("no such kernel")):

        def fails(rows: Any, error: BackendError = error) -> None:
            raise error

        engine._plan.run = fails
        with pytest.raises(BackendError, match=str(error)) as told:
            engine.run({})
        assert isinstance(told.value, OutOfMemoryError) == isinstance(error, OutOfMemoryError)


def test_weights_that_do_not_fit_are_not_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from engines.backends import tensorrt_run

    log = SimpleNamespace(errors=[], reasons=lambda: "Error Code 2: OutOfMemory (Requested size was 9 bytes.)")
    monkeypatch.setattr(tensorrt_run, "logger", lambda _: log)
    library = fake_library()
    library.Runtime = lambda _: SimpleNamespace(deserialize_cuda_engine=lambda plan: None)  # type: ignore[attr-defined]
    spec = step_spec(Path("step.onnx"))
    with pytest.raises(OutOfMemoryError, match=r"weights of step\.onnx do not fit .* lower --precision"):
        tensorrt_run.LoadedPlan.open(library, b"plan", spec, (1,), (), None)
    log.reasons = lambda: "another version"
    assert tensorrt_run.LoadedPlan.open(library, b"plan", spec, (1,), (), None) is None


def test_an_engine_tells_which_batch_sizes_replay_graphs(toy: Bundle, gpu: FakeRun) -> None:
    engine: Any = load_backend("tensorrt", toy, "step_4")
    assert engine.captured == {1: True, 2: False}
    engine.close()
    assert engine.captured == {}


def test_importing_the_backend_imports_no_torch() -> None:
    script = "import sys, engines.backends.tensorrt; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
