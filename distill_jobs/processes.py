"""The processes that train one job together: one alone, or those that torchrun or accelerate started.

The first one alone reads the run folder's state, writes and logs; what it finds, and what goes wrong there, all
of them hear, so that they go on or end together.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, release_memory
from diffusers import ModelMixin
from torch import Tensor, nn

from distill_jobs.errors import JobError, RecipeError
from distill_jobs.sections import ComputeSection
from distill_jobs.sharding import shard

T = TypeVar("T")

LONGEST_STEP = timedelta(minutes=30)
"""Most time that devices wait for each other: then one of the processes is gone."""
LONGEST_WAIT = timedelta(hours=6)
"""Most time that processes wait for work of another's alone, as while the first copies, hashes and writes."""

OF_LAUNCH = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}
"""What ``accelerate launch`` tells its processes of a config, and what it is that they cannot train with."""


class Processes:
    """This process among those of its job.

    compute: how to run the networks; out: the run folder, for TensorBoard. Raises: RecipeError when they were
    started in a way that it does not go with.
    """

    def __init__(self, compute: ComputeSection, out: Path) -> None:
        _check_launch()
        self.compute = compute
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision="bf16" if compute.precision == "bf16" else "no",
            log_with="tensorboard",
            project_dir=str(out),
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # the gradients once, not twice
                InitProcessGroupKwargs(timeout=LONGEST_STEP),
            ],
        )
        self._host = dist.new_group(backend="gloo", timeout=LONGEST_WAIT) if dist.is_initialized() else None
        if compute.precision == "fp32":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        if compute.precision == "bf16" and self.device.type == "cpu":
            # Its backward pass for a CPU takes longer in bfloat16 than all convolutions together.
            torch.backends.cuda.enable_flash_sdp(False)
        if compute.shard and self.count == 1:
            raise RecipeError("compute.shard needs several processes; start the job with torchrun")

    @property
    def count(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def index(self) -> int:
        return int(self.accelerator.process_index)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    def first(self, work: Callable[[], T]) -> T:
        """What ``work`` returns in the first process, in all of them. A JobError there is raised in all."""
        if self.count == 1:
            return work()
        said: list[T | JobError | None] = [None]
        if self.is_first:
            try:
                said = [work()]
            except JobError as error:
                said = [error]
        dist.broadcast_object_list(said, src=0, group=self._host)
        outcome = cast("T | JobError", said[0])
        if isinstance(outcome, JobError):
            raise outcome
        return outcome

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag, whether it is set in any process."""
        if self.count == 1:
            return list(flags)
        counts = self.accelerator.reduce(torch.tensor(flags, dtype=torch.int32, device=self.device), "sum")
        return [bool(count) for count in counts]

    def gathered(self, rows: Tensor) -> Tensor:
        """(B·count, …) the rows of all processes, in the order of the whole batch."""
        whole: Tensor = self.accelerator.gather(rows) if self.count > 1 else rows
        return whole

    def listed(self, items: list[T]) -> list[T]:
        """The items of all processes, once each has its own."""
        if self.count == 1:
            return items
        everyones: list[list[T]] = [[] for _ in range(self.count)]
        dist.all_gather_object(everyones, items, group=self._host)
        return [item for each in everyones for item in each]

    def trained(self, network: nn.Module) -> nn.Module:
        """The network on its device, its gradients averaged over the processes, or itself sharded over them."""
        self._forget()
        if self.compute.gradient_checkpointing:
            cast(ModelMixin, network).enable_gradient_checkpointing()
        if not self.compute.shard:
            return self._prepared(network)
        return self._prepared(shard(network, self.device), evaluation_mode=True)

    def frozen(self, network: nn.Module) -> nn.Module:
        """A network that is only evaluated: on its device, in eval mode, sharded where the trained one is."""
        self._forget()
        network = network.eval().requires_grad_(False)
        if self.compute.shard:
            network = shard(network, self.device)
        return self._prepared(network, evaluation_mode=True)

    def _forget(self) -> None:
        """Free the networks of phases before, which the accelerator lists, and whose layers refer to each other."""
        self.accelerator.free_memory()
        release_memory()  # again: the accelerator lets its list go after it has collected garbage

    def _prepared(self, network: nn.Module, evaluation_mode: bool = False) -> nn.Module:
        prepared: nn.Module = self.accelerator.prepare_model(network, evaluation_mode=evaluation_mode)
        return prepared


def _check_launch() -> None:
    """Raises: RecipeError when the accelerate config that the job was launched with shards networks its own way."""
    found = [name for flag, name in OF_LAUNCH.items() if os.environ.get(flag, "false").lower() in ("1", "true")]
    if found:
        raise RecipeError(
            f"the accelerate config sets {', '.join(found)}; start the job with torchrun, or with a config of "
            "plain multi-GPU training: what splits networks over the processes is compute.shard"
        )


def launched_rank() -> int:
    """This process's number as torchrun tells it, before the processes know of each other; 0 for one alone."""
    return int(os.environ.get("RANK", "0"))
