"""Networks split over the processes of a job: FSDP2, torch's ``fully_shard``, and its tensors whole again.

accelerate's own FSDP2 is not used: on CPU it silently becomes plain data parallelism.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def shard(network: nn.Module, device: torch.device) -> nn.Module:
    """Split ``network`` in place over all processes, block by block as diffusers names its unsplittable ones."""
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    blocks = set(getattr(network, "_no_split_modules", None) or ())
    network.to(device)
    for module in reversed(list(network.modules())):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, of a sharded one in all processes (which must all ask)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part(full: Tensor, like: Tensor) -> Tensor:
    """A copy of ``full`` placed as ``like`` is: on its device, and sharded where it is."""
    copy = full.to(like.device, copy=True)
    if isinstance(like, DTensor):
        return distribute_tensor(copy, like.device_mesh, like.placements, src_data_rank=None)
    return copy


def fill(held: Tensor, full: Tensor) -> None:
    """Copy ``full`` into ``held`` in place; of a sharded one each process what it holds."""
    local(held).copy_(local(part(full, held)) if isinstance(held, DTensor) else full)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded(shard_of: Tensor, like: Tensor) -> Tensor:
    """The tensor of which every process holds ``shard_of``, sharded as ``like`` is; nothing is gathered."""
    if not isinstance(like, DTensor):
        return shard_of
    return DTensor.from_local(
        shard_of, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
