"""LoRA students: stage two trained as low-rank adapters over one frozen network, the chain's source.

Saved twice: as adapters, small files that diffusers and peft load over that network; and folded into it, a plain
stock folder like any other student's. Source: Hu et al. 2022.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import Conv2d, Linear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill_jobs.sections import ChainSection, StageTwoSection
from distill_jobs.student import load_stock, with_weights

FOLDER = "adapter"


@dataclass(frozen=True)
class Adapters:
    """The adapters of one halving. base: folder of the frozen network; before: of the student to start as."""

    rank: int
    base: Path
    before: Path | None

    @classmethod
    def of(cls, section: ChainSection, base: Path, before: Path | None) -> Adapters | None:
        """Those that a section asks for, or None where whole networks are trained."""
        if not isinstance(section, StageTwoSection) or section.lora is None:
            return None
        return cls(section.lora.rank, base, before)

    def start(self) -> UNet2DConditionModel:
        """The base under adapters that make it the student before, or leave it as it is where there is none."""
        network = with_adapters(load_stock(self.base), self.rank)
        if self.before is not None:
            set_peft_model_state_dict(network, load_file(self.before / FOLDER / LORA_WEIGHT_NAME_SAFE))
        return network

    @staticmethod
    def save(folder: Path, network: UNet2DConditionModel) -> UNet2DConditionModel:
        """Write a trained network's adapters into ``folder``/adapter; returns the network with them folded in."""
        tensors = {name: t.detach().cpu().contiguous() for name, t in get_peft_model_state_dict(network).items()}
        config = network.peft_config["default"].to_dict()
        metadata = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
        (folder / FOLDER).mkdir(parents=True)
        described = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(metadata, sort_keys=True)}
        save_file(tensors, folder / FOLDER / LORA_WEIGHT_NAME_SAFE, metadata=described)
        return folded(network)


def with_adapters(network: UNet2DConditionModel, rank: int) -> UNet2DConditionModel:
    """The network, frozen, under trainable adapters of every linear and convolution layer; unchanged at first."""
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    network.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
    return network


def folded(network: UNet2DConditionModel) -> UNet2DConditionModel:
    """A plain network on the CPU, equal to one under adapters to rounding: W + B·A for every layer's W."""
    weights: dict[str, Tensor] = {
        name.replace(".base_layer.", "."): tensor.detach().cpu().clone()
        for name, tensor in network.state_dict().items()
        if ".lora_" not in name
    }
    for name, layer in network.named_modules():
        if isinstance(layer, Linear | Conv2d):
            weights[f"{name}.weight"] += layer.get_delta_weight("default").detach().cpu()
    with torch.device("meta"):
        plain = UNet2DConditionModel.from_config(network.config)
    return with_weights(plain, weights)


def adapter_parameters(network: nn.Module, rank: int) -> int:
    """How many parameters the adapters of a network have."""
    count = 0
    for module in network.modules():
        if isinstance(module, nn.Linear):
            count += rank * (module.in_features + module.out_features)
        elif isinstance(module, nn.Conv2d):
            width, height = module.kernel_size
            count += rank * (module.in_channels // module.groups * width * height + module.out_channels)
    return count
