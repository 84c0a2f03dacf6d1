"""Networks on disk: stock folders whose weights are one file, whatever their size."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import modeling_utils
from huggingface_hub import split_torch_state_dict_into_shards

from distill_jobs.recipe_file import read_recipe
from distill_jobs.student import (
    fold_grid,
    load_stock,
    new_teacher,
    save_stock,
    student_of,
    told_its_grid,
    weights_sha256,
)
from engines.schedule import NoiseSchedule
from tests.support.tiny_recipe import OVERRIDES


def test_networks_of_more_than_ten_gigabytes_are_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_recipe("digits", OVERRIDES)
    network = new_teacher(recipe.unet, 0)
    times = 20_000_000_000 // sum(p.numel() * p.element_size() for p in network.parameters())

    def of_larger(weights: Any, *, max_shard_size: str, **rest: Any) -> Any:
        """What diffusers decides of weights of 20 GB, twice those of SDXL in float32."""
        allowed = int(max_shard_size[:-2]) * {"GB": 10**9, "TB": 10**12}[max_shard_size[-2:]]
        return split_torch_state_dict_into_shards(weights, max_shard_size=allowed // times, **rest)

    monkeypatch.setattr(modeling_utils, "split_torch_state_dict_into_shards", of_larger)
    save_stock(tmp_path, network, NoiseSchedule(recipe.schedule), recipe.clip)
    assert len(weights_sha256(tmp_path)) == 64
    for name, tensor in load_stock(tmp_path).state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name])


def test_a_network_made_of_another_initialises_none() -> None:
    """Random weights that are thrown away would move the caller's random numbers, and take seconds of SDXL's."""
    student = student_of(new_teacher(read_recipe("digits", OVERRIDES).unet, 0))
    before = torch.random.get_rng_state()
    fold_grid(told_its_grid(student), 2)
    assert torch.equal(torch.random.get_rng_state(), before)
