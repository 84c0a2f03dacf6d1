"""Products in fewer bits: the emulation against rounding by hand, and an autoencoder that float16 cannot hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the field's name for it)

from distill_jobs.lowered import lowered_parity
from distill_jobs.onnx_export import ExportError, reference_outputs
from distill_jobs.parity import parity_latents, write_checked
from distill_jobs.pipelines.graphs import LatentDecodeGraph
from distill_jobs.pipelines.vae import Autoencoder
from engines.backends.openvino import OpenVinoBackend
from engines.manifest import IMAGE, LATENT, Lowered

FLOAT16_MAX = 65_504


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_products_alone_are_rounded(dtype: Lowered, kind: torch.dtype) -> None:
    def low(tensor: Tensor) -> Tensor:
        return tensor.to(kind).float()

    torch.manual_seed(0)
    layer, x = nn.Linear(16, 16).requires_grad_(False), torch.randn(4, 16)
    network = nn.Sequential(layer, nn.Softmax(-1))
    by_hand = torch.softmax(low(low(x) @ low(layer.weight).T + low(layer.bias)), -1)
    found = lowered_parity(network, [x], [by_hand.double().numpy()], dtype)
    assert found is not None
    assert found.max_abs_error <= 1e-6
    exact = lowered_parity(network, [x], reference_outputs(network, [x], "x"), dtype)
    assert exact is not None
    assert exact.max_abs_error > 1e-5
    assert exact.rows == 4


def test_the_products_of_attention_are_rounded_too() -> None:
    x = torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(0))
    low = x.to(torch.bfloat16).float()
    scores = (low @ low.transpose(-1, -2)).to(torch.bfloat16).float() / 4
    weights = torch.softmax(scores, -1).to(torch.bfloat16).float()
    by_hand = (weights @ low).to(torch.bfloat16).double()
    found = lowered_parity(Attention(), [x], [by_hand.numpy()], "bfloat16")
    assert found is not None
    assert found.max_abs_error < 0.03
    assert found.mean_abs_error < 1e-3


def small_decoder() -> tuple[AutoencoderKL, LatentDecodeGraph]:
    torch.manual_seed(0)
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4).eval().requires_grad_(False)
    return vae, LatentDecodeGraph(Autoencoder(vae, 0.18215))


def test_a_decoder_that_gives_nan_is_refused_though_its_images_are_whole_numbers() -> None:
    (vae, graph), latents = small_decoder(), parity_latents(2, (4, 8, 8))
    reference_outputs(graph, [latents], "decode")
    vae.decoder.conv_in.bias[0] = float("nan")
    assert graph(latents).dtype == torch.uint8
    with pytest.raises(ExportError, match="decode: the model gives NaN or infinity"):
        reference_outputs(graph, [latents], "decode")


def test_an_autoencoder_beyond_float16_is_told_and_bfloat16_decodes_it(tmp_path: Path) -> None:
    """As SDXL's: activations that float16 cannot hold, between normalisations that bring them back."""
    (vae, graph), latents = small_decoder(), parity_latents(32, (4, 8, 8))
    first = vae.decoder.conv_in
    first.weight *= 1e6
    assert float(first(latents).abs().max()) > FLOAT16_MAX
    spec = write_checked(graph, [latents], graph.inputs(8, 8), graph.outputs(8, 8), tmp_path / "decode.onnx", 1)
    assert spec.lowered["float16"] is None
    lowered = spec.lowered["bfloat16"]
    assert lowered is not None
    assert lowered.max_abs_error <= 8  # grey levels
    images = OpenVinoBackend(tmp_path / "decode.onnx", spec, precision="bfloat16").run({LATENT: latents.numpy()})
    assert np.abs(images[IMAGE].astype(int) - graph(latents).numpy()).max() <= 8
