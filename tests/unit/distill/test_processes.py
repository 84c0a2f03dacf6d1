"""Several processes train as one does: same losses, one writer, common ends."""

import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from accelerate.utils import InitProcessGroupKwargs
from safetensors.torch import load_file
from torch import nn

from distill_jobs import processes as processes_module
from distill_jobs.checkpoint import intact_checkpoint
from distill_jobs.errors import RecipeError
from distill_jobs.processes import Processes
from distill_jobs.run_folder import RunFolder
from distill_jobs.sections import ComputeSection
from tests.support.job_process import JobRun, ended, together
from tests.support.losses import losses_of
from tests.support.tiny_recipe import OVERRIDES

ROOT = Path(__file__).parents[3]
RECIPE = [
    *OVERRIDES,
    "teacher.updates=50",
    "teacher.anneal=false",
    "stage_one.updates=6",
    "stage_two.halvings=[{steps: 2, updates: 4}, {steps: 1, updates: 4}]",
    "export.students=[2, 1]",
    "export.default_steps=2",
    "log_every=1",
]
SHARED = [*RECIPE, *(f"{section}.accumulate=2" for section in ("teacher", "stage_one", "stage_two"))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    assert JobRun(out, RECIPE).exit_code() == 0
    return out


def assert_same_losses(run: Path, alone: Path, tolerances: dict[str, float], updates: dict[str, int]) -> None:
    """Each update of the phases named in ``tolerances``, replayed ones each time."""
    found, expected = losses_of(run), losses_of(alone)
    assert {phase: len(found[phase]) for phase in updates} == updates
    for phase, tolerance in tolerances.items():
        for update, values in found[phase].items():
            assert values == pytest.approx([expected[phase][update][0]] * len(values), rel=tolerance)


def follows(run: Path, alone: Path) -> None:
    tolerances = {"teacher": 1e-5, "stage_one": 1e-4, "d2": 1e-4, "d1": 1e-4}
    assert_same_losses(run, alone, tolerances, {"teacher": 50, "stage_one": 6, "d2": 4, "d1": 4})


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A job under torchrun: two processes."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "distill_jobs", "run", "digits", "--out", str(out), "--resume"]
    command += [part for override in SHARED for part in ("--set", override)]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )
    yield process, out
    if process.poll() is None:
        process.terminate()
        process.wait(60)


def test_two_processes_follow_one(alone: Path, tmp_path: Path) -> None:
    """Guided losses begin near 0, as differences of nearly equal networks: rounding weighs more in them."""
    out = tmp_path / "run"
    assert ended(*together([JobRun(out, SHARED)] * 2)) == 0
    follows(out, alone)


@pytest.mark.long
def test_when_one_of_them_is_killed_the_job_ends_and_is_taken_up_again(
    launched: tuple[subprocess.Popen[str], Path], alone: Path
) -> None:
    launcher, out = launched
    while intact_checkpoint(out / "checkpoints" / "teacher") is None:
        assert launcher.poll() is None, launcher.stderr and launcher.stderr.read()
        time.sleep(0.02)
    workers = psutil.Process(launcher.pid).children()
    assert len(workers) == 2
    os.kill(max(worker.pid for worker in workers), signal.SIGKILL)
    launcher.communicate(timeout=600)
    assert launcher.returncode != 0
    assert not [worker for worker in workers if worker.is_running()]
    assert not (out / "students").exists()
    assert ended(*together([JobRun(out, SHARED)] * 2)) == 0
    follows(out, alone)


@pytest.mark.long
def test_a_sharded_job_follows_one_process_and_resumes_after_a_signal_to_one_process(
    alone: Path, tmp_path: Path
) -> None:
    """FSDP2: the checkpoint holds whole tensors, each process takes up its own part of them again.

    Resumed with gradient checkpointing, as SDXL is trained.
    """
    out = tmp_path / "run"
    recipe = [*RECIPE, "compute.shard=true", "teacher.updates=12", "teacher.accumulate=2"]
    first, second = together([JobRun(out, recipe)] * 2)
    while intact_checkpoint(out / "checkpoints" / "teacher") is None:
        assert first.exitcode is None
        time.sleep(0.02)
    assert second.pid is not None
    os.kill(second.pid, signal.SIGTERM)
    assert ended(first, second) == 4
    assert not (out / "teacher").exists()
    assert ended(*together([JobRun(out, [*recipe, "compute.gradient_checkpointing=true"])] * 2)) == 0
    assert_same_losses(out, alone, {"teacher": 1e-5}, {"teacher": 12, "stage_one": 6, "d2": 4, "d1": 4})
    for phase in ("teacher", "stage_one", "students/d1"):
        weights = Path(phase) / "unet" / "diffusion_pytorch_model.safetensors"
        found, expected = load_file(out / weights), load_file(alone / weights)
        assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}


def test_what_goes_wrong_in_the_first_process_ends_all(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with RunFolder(out).locked():
        assert ended(*together([JobRun(out, RECIPE)] * 2)) == 3
    assert ended(*together([JobRun(out, [*RECIPE, "teacher.batch_size=9"])] * 2)) == 2


def test_sharding_alone_is_refused(tmp_path: Path) -> None:
    assert JobRun(tmp_path / "run", [*RECIPE, "compute.shard=true"]).exit_code() == 2


@pytest.mark.parametrize("flag", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"])
def test_another_way_to_split_networks_is_refused(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(flag, "true")
    with pytest.raises(RecipeError, match=r"accelerate config sets \w.*torchrun.*compute\.shard"):
        Processes(ComputeSection(), tmp_path)


def test_a_network_that_nothing_uses_any_more_is_freed_before_the_next_is_prepared(tmp_path: Path) -> None:
    processes = Processes(ComputeSection(), tmp_path)

    def used() -> weakref.ref[nn.Module]:
        network = nn.Linear(2, 2)
        network.cycle = [network]  # type: ignore[assignment]
        return weakref.ref(processes.frozen(network))

    before = used()
    processes.frozen(nn.Linear(2, 2))
    assert before() is None


class Two:
    """Stands in for accelerate's object: the first of two processes."""

    num_processes, process_index, device = 2, 0, torch.device("cpu")

    def __init__(self, kwargs_handlers: list[object], **_: object) -> None:
        [told] = [each for each in kwargs_handlers if isinstance(each, InitProcessGroupKwargs)]
        Two.timeout = told.timeout

    timeout: timedelta | None = None


def test_devices_wait_for_a_lost_process_no_longer_than_a_step_takes_but_hosts_for_work_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[dict[str, object]] = []
    waited: list[object] = []

    def new_group(**told: object) -> str:
        groups.append(told)
        return "host"

    def gather(everyones: list[list[int]], items: list[int], group: object) -> None:
        waited.append(group)
        everyones[:] = [items, [3]]

    monkeypatch.setattr(processes_module, "Accelerator", Two)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda said, src, group: waited.append(group))
    monkeypatch.setattr(dist, "all_gather_object", gather)
    processes = Processes(ComputeSection(), tmp_path)
    assert Two.timeout == timedelta(minutes=30)
    assert groups == [{"backend": "gloo", "timeout": timedelta(hours=6)}]
    assert processes.first(lambda: 7) == 7
    assert processes.listed([1, 2]) == [1, 2, 3]
    assert waited == ["host", "host"]


def test_fp32_is_without_tf32(tmp_path: Path) -> None:
    """Left alone, torch rounds the convolutions' inputs to 10 bits on Ampere and later, and not the products'."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    Processes(ComputeSection(precision="fp32"), tmp_path)
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


def test_bf16_runs_the_networks_lower_and_keeps_weights_and_targets(alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    lower = ["compute.precision=bf16", "compute.gradient_checkpointing=true", "teacher.updates=10"]
    assert JobRun(out, [*RECIPE, *lower]).exit_code() == 0
    weights = load_file(out / "stage_one" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    found, expected = losses_of(out)["teacher"], losses_of(alone)["teacher"]
    first = [(found[update][0], expected[update][0]) for update in range(1, 5)]
    assert all(a == pytest.approx(b, rel=0.02) for a, b in first)
    assert all(a != pytest.approx(b, rel=1e-6) for a, b in first)
