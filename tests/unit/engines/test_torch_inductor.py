"""torch's compiler: what it makes of a bundle's graphs, on the CPU, and what is kept of it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch._inductor import config as inductor_config

from engines.backends import torch_inductor
from engines.backends.graph_file import read_graph
from engines.backends.load import BUILT, OFFERED, ON_GPU, source_sha256
from engines.backends.onnxruntime import OnnxRuntimeBackend
from engines.backends.plan_store import PlanStore
from engines.backends.torch_fused import fused_module
from engines.backends.torch_inductor import TorchInductorBackend, load_program, trace
from engines.bundle import Bundle
from engines.cache import EngineKey
from engines.condition import load_tokenizer
from engines.errors import BackendError, OutOfMemoryError
from engines.examples import example_inputs
from engines.manifest import GraphSpec, Parity, TensorSpec
from tests.support.on_torch import check_close
from tests.support.step_rows import random_rows, step_spec
from tests.support.toy_bundle import ToyOptions, make_toy_bundle

Engine = Callable[..., TorchInductorBackend]
on_cpu: Engine = partial(TorchInductorBackend, device="cpu")


def store_in(cache: Path, rungs: tuple[int, ...] = (2, 4), sizes: tuple[str, ...] = ()) -> PlanStore:
    return PlanStore(cache, EngineKey("graph", "torch-inductor", "a GPU", 0), rungs, sizes)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, unet_file: Path) -> Path:
    """Of the UNet, compiled for 2 and 4 rows."""
    folder = tmp_path_factory.mktemp("cache")
    engine = on_cpu(unet_file, step_spec(unet_file), rungs=(2, 4), store=store_in(folder))
    for count in (2, 4):
        engine.run(random_rows(count, seed=0))
    engine.close()
    return folder


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be compiled."""
    monkeypatch.setattr(torch_inductor, "compile_program", lambda *_: pytest.fail("compiled again"))


def test_a_kept_engine_computes_what_the_reference_does(never: None, cache: Path, unet_file: Path) -> None:
    spec, rows = step_spec(unet_file), random_rows(5, seed=2)
    engine = on_cpu(unet_file, spec, rungs=(2, 4), store=store_in(cache))
    check_close(engine, rows, OnnxRuntimeBackend(unet_file, spec).run(rows), 1e-5)
    first = engine.run(rows)
    kept = {name: array.copy() for name, array in first.items()}
    engine.run(random_rows(5, seed=3))
    assert engine.release()
    again = engine.run(rows)
    for name, array in first.items():
        np.testing.assert_array_equal(array, kept[name])
        np.testing.assert_array_equal(array, again[name])
    engine.close()
    with pytest.raises(BackendError, match="load it again"):
        engine.run(rows)


def test_plans_hold_no_weights_and_are_kept_one_by_one(never: None, cache: Path, unet_file: Path) -> None:
    """So a build that was killed goes on where it was, and other batch sizes compile none of these again."""
    plans = sorted(cache.rglob("*.plan"))
    assert [plan.name for plan in plans] == ["engine-2.plan", "engine-4.plan"]
    weights = {name: np.prod(t.dims) for t in onnx.load(str(unet_file)).graph.initializer if (name := t.name)}
    largest = max(weights, key=weights.__getitem__)
    module = fused_module(read_graph(unet_file))
    held = module.weights[largest].numpy().tobytes()[:256]
    assert all(held not in plan.read_bytes() for plan in plans)
    engine = on_cpu(unet_file, step_spec(unet_file), rungs=(1, 2, 8), store=store_in(cache, (1, 2, 8)))
    engine.run(random_rows(2, seed=0))


@pytest.mark.parametrize(("limit", "asked", "used"), [(3, None, 3), (0, None, 7), (3, "5", 7)])
def test_no_more_compile_at_once_than_a_cpu_limit_pays_for(
    limit: int, asked: str | None, used: int, unet_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a process with memory of its own; torch counts the machine's cores, unless it is told."""
    monkeypatch.setattr(torch_inductor, "limited_threads", lambda: limit)
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", asked)
    with inductor_config.patch(compile_threads=7):
        on_cpu(unet_file, step_spec(unet_file), rungs=(2,)).close()
        assert inductor_config.compile_threads == used


def test_a_plan_altered_on_disk_is_compiled_again(
    cache: Path, unet_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[bytes] = []
    plan = store_in(cache).of(2, 0).load("plan")
    assert plan is not None

    def compile_again(*_: object) -> bytes:
        compiled.append(plan)
        return plan

    monkeypatch.setattr(torch_inductor, "compile_program", compile_again)
    for _ in range(2):
        on_cpu(unet_file, step_spec(unet_file), rungs=(2,), store=store_in(tmp_path)).run(random_rows(2, seed=0))
    assert len(compiled) == 1
    [file] = tmp_path.rglob("*.plan")
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    on_cpu(unet_file, step_spec(unet_file), rungs=(2,), store=store_in(tmp_path)).run(random_rows(2, seed=0))
    assert len(compiled) == 2


@pytest.mark.parametrize("plan", [b"", b"junk", b"PK\x03\x04"])
def test_a_plan_that_torch_does_not_take_is_none(plan: bytes) -> None:
    assert load_program(plan, "cpu") is None


def test_a_plan_is_not_compiled_again_where_there_is_no_room_to_unpack_it(
    never: None, cache: Path, unet_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    engine = on_cpu(unet_file, step_spec(unet_file), rungs=(2,), store=store_in(cache))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BackendError, match=r"step\.onnx: .*2 rows.*No space left on device"):
        engine.run(random_rows(2, seed=0))


def test_a_plan_of_another_torch_is_none(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import codecache

    plan = store_in(cache).of(2, 0).load("plan")
    assert plan is not None
    monkeypatch.setattr(codecache, "torch_key", lambda: b"another")
    assert load_program(plan, "cpu") is None


def test_every_kind_of_graph_compiles_in_16_bits(toy: Bundle) -> None:
    tokenizer = load_tokenizer(toy)
    for graph, spec in toy.manifest.graphs.items():
        file, rows = toy.graph_file(graph), example_inputs(toy.manifest, tokenizer, graph, 2)
        engine = on_cpu(file, spec, precision="bfloat16", rungs=(2,))
        check_close(engine, rows, OnnxRuntimeBackend(file, spec).run(rows), 0.03)
        assert engine.name == f"torch-inductor {torch.__version__} bfloat16"


def test_each_size_of_image_is_compiled_by_itself(tmp_path: Path) -> None:
    sized = make_toy_bundle(tmp_path / "bundle", ToyOptions(steps=(2,), default_steps=2, sizes=((8, 8), (16, 8))))
    spec, file, tokenizer = sized.manifest.graphs["step_2"], sized.graph_file("step_2"), load_tokenizer(sized)
    reference, sizes = OnnxRuntimeBackend(file, spec), sized.manifest.sizes
    store = store_in(tmp_path / "cache", (1,), tuple(str(size) for size in sizes))
    engine = on_cpu(file, spec, rungs=(1,), sizes=sizes, store=store)
    for size in (*sizes, *sizes):
        rows = example_inputs(sized.manifest, tokenizer, "step_2", 1, size=size)
        check_close(engine, rows, reference.run(rows), 1e-5)
    kept = {file.name for file in (tmp_path / "cache").rglob("*.plan")}
    assert kept == {f"engine-1-{size}.plan" for size in sizes}


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (
            RuntimeError("CppCompileError: no compiler\nits whole output"),
            BackendError,
            r"step\.onnx: cannot make 2 rows ready \(CppCompileError: no compiler\); --backend torch-cuda runs",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemoryError, r"step\.onnx finds no memory for 2 rows"),
    ],
)
def test_what_the_compiler_cannot_do_is_one_sentence(
    error: Exception, kind: type[Exception], message: str, unet_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> Any:
        raise error

    monkeypatch.setattr(torch_inductor, "standalone_compile", fails)
    engine = on_cpu(unet_file, step_spec(unet_file), rungs=(2,))
    with pytest.raises(kind, match=message) as caught:
        engine.run(random_rows(2, seed=0))
    assert "whole output" not in str(caught.value)


@pytest.mark.parametrize("switch", ["force_disable_caches", "fx_graph_cache"])
def test_caches_that_are_switched_off_are_named(switch: str, unet_file: Path) -> None:
    with torch._inductor.config.patch({switch: switch == "force_disable_caches"}):
        engine = on_cpu(unet_file, step_spec(unet_file), rungs=(2,))
        with pytest.raises(BackendError, match=r"step\.onnx: torch's caches are switched off.*FX_GRAPH_CACHE"):
            engine.run(random_rows(2, seed=0))


def small_graphs() -> dict[str, list[onnx.NodeProto]]:
    """From x, of b rows of 3, to y."""
    node = helper.make_node
    return {
        "nothing to compute": [node("Identity", ["x"], ["y"])],
        "a length as data": [
            node("Shape", ["x"], ["s"]),
            node("Cast", ["s"], ["f"], to=TensorProto.FLOAT),
            node("Gather", ["f", "one"], ["width"]),
            node("Mul", ["x", "width"], ["y"]),
        ],
        "a constant that is a length and data": [
            node("Reshape", ["x", "shape"], ["r"]),
            node("Cast", ["shape"], ["f"], to=TensorProto.FLOAT),
            node("ReduceMean", ["f"], ["mean"], keepdims=0),
            node("Mul", ["r", "mean"], ["y"]),
        ],
        "positions": [
            node("Shape", ["x"], ["s"]),
            node("Gather", ["s", "one"], ["width"]),
            node("Range", ["zero", "width", "one"], ["r"]),
            node("Cast", ["r"], ["f"], to=TensorProto.FLOAT),
            node("Add", ["x", "f"], ["y"]),
        ],
        "an output of lengths alone": [
            node("Shape", ["x"], ["s"]),
            node("Expand", ["five", "s"], ["y"]),
        ],
    }


@pytest.mark.parametrize("name", small_graphs())
def test_what_shapes_decide_is_known_when_it_is_compiled(name: str, tmp_path: Path) -> None:
    stored = {"zero": np.array(0), "one": np.array(1), "shape": np.array([0, 3]), "five": np.float32([[5]])}
    x, y = (helper.make_tensor_value_info(each, TensorProto.FLOAT, ["b", 3]) for each in "xy")
    constants = [numpy_helper.from_array(array, each) for each, array in stored.items()]
    graph = helper.make_graph(small_graphs()[name], "graph", [x], [y], constants)
    file, opsets = tmp_path / "g.onnx", [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), file)
    tensors = [TensorSpec(name=each, dtype="float32", shape=(-1, 3)) for each in "xy"]
    parity = Parity(reference="none", max_abs_error=0, mean_abs_error=0, rows=0)
    spec = GraphSpec(file="g.onnx", inputs=(tensors[0],), outputs=(tensors[1],), parity=parity)
    engine, rows = on_cpu(file, spec, rungs=(2,)), {"x": np.float32([[1, 2, 3], [4, 5, 6]])}
    first = engine.run(rows)
    engine.run({"x": rows["x"] + 1})
    np.testing.assert_allclose(first["y"], OnnxRuntimeBackend(file, spec).run(rows)["y"])


def test_nothing_of_shapes_is_left_for_a_device(unet_file: Path) -> None:
    """Traced on one that has no values: reading one, or mixing it with the CPU, would raise."""
    module = fused_module(read_graph(unet_file), "bfloat16", "meta")
    inputs = {name: torch.from_numpy(array).to("meta") for name, array in random_rows(3, seed=0).items()}
    graph, taken, constants = trace(module, inputs, ("clean",))
    given: list[Tensor] = [{**module.weights, **constants, **inputs}[name] for name in taken]
    [clean] = graph(*given)
    assert (clean.device.type, tuple(clean.shape)) == ("meta", (3, 1, 8, 8))
    assert len(taken) == len(set(taken))
    assert {"latent", "timestep", "guidance", "condition"} <= set(taken)
    assert "noise" not in taken  # the clean estimate does not depend on it


def test_the_compilers_own_folder_is_this_process_alone_and_goes_with_it() -> None:
    """Whatever it finds there it runs."""
    script = (
        "import os; from engines.backends.torch_inductor import _workshop; folder = _workshop().name;"
        "print(folder, os.stat(folder).st_mode, os.environ['TORCHINDUCTOR_CACHE_DIR'] == folder)"
    )
    theirs = {"TORCHINDUCTOR_CACHE_DIR": "/elsewhere", "TRITON_CACHE_DIR": "/elsewhere"}
    said = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **theirs}, capture_output=True, text=True, check=True
    ).stdout
    folder, mode, is_used = said.split()
    assert stat.S_IMODE(int(mode)) == 0o700
    assert is_used == "True"
    assert not Path(folder).exists()


def test_it_is_built_for_gpus_by_code_that_keys_name() -> None:
    assert "torch-inductor" in BUILT & ON_GPU
    assert OFFERED["torch-inductor"] == OFFERED["torch-cuda"]
    assert source_sha256("torch-inductor") not in ("", source_sha256("torch-cuda"))
