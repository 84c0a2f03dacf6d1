"""The training loop on a network of one layer: what is not finite is not applied, and rewinds make progress."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distill_jobs import state
from distill_jobs.checkpoint import Checkpoint, intact_checkpoint, load_checkpoint, write_checkpoint
from distill_jobs.draws import Draws
from distill_jobs.errors import DivergedError, Interrupted, JobError
from distill_jobs.loop import Trainer
from distill_jobs.processes import Processes
from distill_jobs.sections import ComputeSection, Training
from distill_jobs.signals import StopSignal
from distill_jobs.state import Phase, RowLoss, TrainingState

WIDTH = 4
BATCH = 8

Row = Callable[[Tensor, int, Tensor], Tensor]


def layer() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(WIDTH, 1, bias=False)


def train(
    out: Path,
    row: Row,
    progress: Progress | None = None,
    stop: StopSignal | None = None,
    every: int = 5,
    name: str = "phase",
    **training: Any,
) -> dict[str, Tensor]:
    """Fit one linear layer with ``row``: (output (B,), update, weight) → loss (B,), checkpoints every ``every``."""
    settings = Training(**{"updates": 20, "batch_size": BATCH, "lr": 0.1, "warmup": 0, "ema": 0.9, **training})

    def loss(layer: nn.Module, draws: Draws, update: int, rows: int) -> RowLoss:
        output = layer(draws.normal(update, (rows, WIDTH)))[:, 0]
        return RowLoss(row(output, update, next(layer.parameters())))

    trainer = Trainer(
        Processes(ComputeSection(), out),
        checkpoints=out / "checkpoints",
        every=every,
        log_every=1,
        stop=stop or StopSignal(),
        progress=progress or Progress(disable=True),
    )
    return trainer.train(Phase(name, settings, layer(), Draws(7, "phase"), loss))[0]


def square(output: Tensor, *_: object) -> Tensor:
    return (output - 1).square()


def too_large(*_: object) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def bad_at(*updates: int, value: float = float("nan")) -> Row:
    return lambda output, update, _: square(output) * (value if update in updates else 1.0)


def test_an_update_with_a_loss_that_is_not_finite_is_not_applied(tmp_path: Path) -> None:
    display = Progress(disable=True, console=Console(record=True, quiet=True))
    kept = train(tmp_path / "bad", bad_at(3, 9, 10), display)
    assert torch.isfinite(kept["weight"]).all()
    assert not torch.equal(kept["weight"], train(tmp_path / "good", square)["weight"])


def test_a_gradient_that_is_not_finite_is_not_applied(tmp_path: Path) -> None:
    """The square root has an infinite gradient at 0, where its value is 0."""

    def row(output: Tensor, update: int, _: Tensor) -> Tensor:
        return square(output) + ((output * 0).sqrt() if update == 3 else 0)

    assert torch.isfinite(train(tmp_path, row)["weight"]).all()


def test_skipped_updates_leave_weights_and_average_as_they_were(tmp_path: Path) -> None:
    """With every update but the first two skipped, the result is that of two updates."""
    two = train(tmp_path / "two", square, updates=2, anneal=False)
    with_skips = train(tmp_path / "skips", bad_at(2, 3), updates=4, anneal=False)
    assert torch.equal(two["weight"], with_skips["weight"])


def cliff(output: Tensor, _: int, weight: Tensor) -> Tensor:
    """Infinite where any weight is beyond 0.6: a step too far falls off it, and no update leads back."""
    return square(output) * torch.where(weight.detach().abs().max() > 0.6, float("inf"), 1.0)


TOO_FAST: dict[str, Any] = {"lr": 0.9, "anneal": False, "clip_norm": 1e9}


def test_three_in_a_row_go_back_to_the_last_checkpoint_with_half_the_learning_rate(tmp_path: Path) -> None:
    said: list[str] = []
    display = Progress(disable=True)
    display.console.log = said.append  # type: ignore[method-assign]
    kept = train(tmp_path, cliff, display, **TOO_FAST)
    assert torch.isfinite(kept["weight"]).all()
    rewinds = [text for text in said if "half the learning rate" in text]
    assert 1 <= len(rewinds) <= 3
    newest = intact_checkpoint(tmp_path / "checkpoints" / "phase")
    assert newest is not None
    assert load_checkpoint(newest).rewinds == len(rewinds)


def test_a_kill_after_a_rewind_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "killed" / "checkpoints" / "phase"

    class Dying(Progress):
        def update(self, *args: Any, **kwargs: Any) -> None:
            newest = intact_checkpoint(folder)
            assert newest is not None
            if load_checkpoint(newest).rewinds and kwargs.get("completed", 0) % 5 == 2:
                raise KeyboardInterrupt

    whole = train(tmp_path / "whole", cliff, **TOO_FAST)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", cliff, Dying(disable=True), **TOO_FAST)
    assert torch.equal(train(tmp_path / "killed", cliff, **TOO_FAST)["weight"], whole["weight"])


@pytest.mark.parametrize("at", [1, 4, 6, 8, 12, 16, 18])
def test_a_stop_between_two_checkpoints_moves_no_rewind(at: int, tmp_path: Path) -> None:
    stop = StopSignal()

    class Stopping(Progress):
        def update(self, *args: Any, **kwargs: Any) -> None:
            stop.received |= kwargs.get("completed") == at

    whole = train(tmp_path / "whole", cliff, **TOO_FAST)
    with pytest.raises(Interrupted):
        train(tmp_path / "stopped", cliff, Stopping(disable=True), stop, **TOO_FAST)
    assert torch.equal(train(tmp_path / "stopped", cliff, **TOO_FAST)["weight"], whole["weight"])


def test_a_rewind_after_a_resume_with_rarer_checkpoints_goes_back_to_the_newest(tmp_path: Path) -> None:
    stop, said, losses = StopSignal(), list[str](), iter([float("nan")] * 3)
    display = Progress(disable=True)
    display.console.log = said.append  # type: ignore[method-assign]

    class Stopping(Progress):
        def update(self, *args: Any, **kwargs: Any) -> None:
            stop.received |= kwargs.get("completed") == 12

    with pytest.raises(Interrupted):
        train(tmp_path, square, Stopping(disable=True), stop)
    kept = train(tmp_path, lambda output, *_: square(output) * next(losses, 1.0), display, every=200)
    assert torch.isfinite(kept["weight"]).all()
    assert [text for text in said if "back to update 12," in text]


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("teacher", "teacher"),
        ("text_encoder", "teacher.text.training"),
        ("decoder", "decoder"),
        ("d8", "stage_two"),
        ("u16", "stage_two"),
        ("e4", "encoder"),
    ],
)
def test_too_little_memory_says_which_fields_need_less(name: str, section: str, tmp_path: Path) -> None:
    told = f"{name}: too little memory .* for 8 rows in 2 micro-batches .*--resume --set {section}.accumulate=4 or"
    with pytest.raises(JobError, match=told):
        train(tmp_path, too_large, name=name, accumulate=2)


def test_single_rows_that_need_too_much_memory_are_not_split_further(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"--resume --set compute\.gradient_checkpointing=true"):
        train(tmp_path, too_large, accumulate=BATCH)


def test_what_stays_infinite_stops_the_job_after_three_rewinds(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="after 3 rewinds"):
        train(tmp_path, lambda output, *_: output * float("nan"))
    newest = intact_checkpoint(tmp_path / "checkpoints" / "phase")
    assert newest is not None
    assert all(bool(torch.isfinite(tensor).all()) for tensor in load_checkpoint(newest).tensors.values())


def test_weights_that_overflow_are_not_checkpointed(tmp_path: Path) -> None:
    """Loss and gradient stay finite, while the optimiser throws the weights to infinity just where one is due."""

    def row(output: Tensor, _: int, weight: Tensor) -> Tensor:
        return (output * 0).nan_to_num() + (weight * 1e-3).sum()

    to_infinity_in_15 = 3.4e38 / 14.5
    kept = train(tmp_path, row, lr=to_infinity_in_15, updates=16, anneal=False)
    assert torch.isfinite(kept["weight"]).all()
    newest = intact_checkpoint(tmp_path / "checkpoints" / "phase")
    assert newest is not None
    assert load_checkpoint(newest).update == 15
    assert load_checkpoint(newest).rewinds == 1


def test_a_signal_ends_with_a_checkpoint_at_that_update(tmp_path: Path) -> None:
    out = tmp_path / "run"
    stop = StopSignal(received=True)
    trainer = Trainer(Processes(ComputeSection(), out), out, 5, 1, stop, Progress(disable=True))

    def loss(layer: nn.Module, draws: Draws, update: int, rows: int) -> RowLoss:
        return RowLoss(square(layer(draws.normal(update, (rows, WIDTH)))[:, 0]))

    network: Any = nn.Linear(WIDTH, 1)
    with pytest.raises(Interrupted, match="update 1"):
        trainer.train(Phase("phase", Training(updates=9, batch_size=BATCH), network, Draws(0, "phase"), loss))
    newest = intact_checkpoint(out / "phase")
    assert newest is not None
    assert load_checkpoint(newest).update == 1


@pytest.mark.parametrize("first", [True, False])
def test_tensors_are_gathered_by_all_and_kept_by_the_first_process(
    first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[Tensor] = []

    def whole(tensor: Tensor) -> Tensor:
        gathered.append(tensor)
        return tensor

    training = linear_state(tmp_path)
    monkeypatch.setattr(state, "whole", whole)
    monkeypatch.setattr(Processes, "is_first", first)
    names = {
        "network.0.weight",
        "ema.0",
        "ema_step",
        *(f"optimizer.0.{k}" for k in ("step", "exp_avg", "exp_avg_sq")),
    }
    assert training.tensors().keys() == (names if first else set())
    assert len(gathered) == len(names)
    assert training.finish().keys() == ({"0.weight"} if first else set())


def linear_state(tmp_path: Path, layers: int = 1) -> TrainingState:
    """A phase under way after one update."""

    def loss(network: nn.Module, draws: Draws, update: int, rows: int) -> RowLoss:
        return RowLoss(network(draws.normal(update, (rows, 64))).square().mean(dim=1))

    network: Any = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(layers)))
    phase = Phase("phase", Training(updates=9, batch_size=BATCH, ema=0.9), network, Draws(0, "phase"), loss)
    training = TrainingState(phase, Processes(ComputeSection(), tmp_path))
    training.advance()
    return training


class Copies(TorchDispatchMode):
    """The most numbers that copies made meanwhile held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
            self._alive.add(made)
            self.most = max(self.most, sum(tensor.numel() for tensor in self._alive))
        return made


def test_a_state_is_taken_up_in_the_memory_that_training_takes(tmp_path: Path) -> None:
    """Also in a rewind, which finds everything held already."""
    layers = 8
    trained, fresh = linear_state(tmp_path, layers), linear_state(tmp_path, layers)
    trained.advance()
    kept = {name: tensor.clone() for name, tensor in trained.tensors().items()}
    with Copies() as copies:
        fresh.restore(Checkpoint(2, 1.0, kept))
    weights = layers * 64 * 64
    assert copies.most < 2 * weights + 64 * 64  # the optimiser's moments, whose own were let go
    found = fresh.tensors()
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())
    assert torch.equal(fresh.advance().loss, trained.advance().loss)  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(fresh.tensors().values(), trained.tensors().values(), strict=True))


@pytest.mark.parametrize("where", ["__init__", "restore"])
def test_memory_that_ends_before_the_first_update_says_the_same(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, square, updates=5)
    write_checkpoint(tmp_path / "checkpoints" / "phase", Checkpoint(5, 1.0, {}))
    monkeypatch.setattr(TrainingState, where, too_large)
    with pytest.raises(JobError, match=r"phase: too little memory .*--resume --set phase\.accumulate=2 or"):
        train(tmp_path, square)


def test_what_is_kept_is_the_average_of_adams_weights_at_rates_that_rise_and_fall(tmp_path: Path) -> None:
    """By hand. The average forgets fast at first: its decay is at most (1 + u)/(10 + u) after update u, from 0."""
    updates, warmup, lr, ema, clip_norm = 30, 4, 0.1, 0.6, 0.5
    rates = {"updates": updates, "warmup": warmup, "lr": lr, "ema": ema, "clip_norm": clip_norm}
    kept = train(tmp_path, square, **rates)["weight"]
    weight = layer().weight.detach().double()
    average, first, second = weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    for u in range(updates):
        x = Draws(7, "phase").normal(u, (BATCH, WIDTH)).double()
        gradient = 2 * (x @ weight.T - 1).T @ x / BATCH
        gradient = gradient * min(1.0, clip_norm / float(gradient.norm()))
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        unbiased = first / (1 - 0.9 ** (u + 1)), second / (1 - 0.999 ** (u + 1))
        rate = lr * min(1, (u + 1) / warmup) * (1 - u / updates)
        weight = weight - rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
        decay = min(ema, (1 + u) / (10 + u)) if u else 0.0
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(kept.double(), average, rtol=0, atol=1e-5)
    assert float((weight - average).abs().max()) > 1e-4


@pytest.mark.parametrize("accumulate", [2, 8])
def test_micro_batches_are_the_large_batch(accumulate: int, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", square)["weight"]
    parts = train(tmp_path / "parts", square, accumulate=accumulate)["weight"]
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
