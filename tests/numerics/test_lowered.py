"""Products in fewer bits: the emulation against rounding by hand, and an autoencoder that float16 cannot hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the field's name for it)

from distill_jobs.lowered import lowered_parity
from distill_jobs.onnx_export import ExportError, reference_outputs
from distill_jobs.parity import FEW_BATCHES, parity_latents, write_checked
from distill_jobs.pipelines.graphs import LatentDecodeGraph
from distill_jobs.pipelines.vae import Autoencoder
from engines.backends.base import Precision
from engines.backends.load import graph_precision
from engines.backends.lowering import lower_products
from engines.backends.openvino import OpenVinoBackend
from engines.backends.torch import OnnxModule
from engines.backends.torch_cuda import TorchCudaBackend
from engines.manifest import IMAGE, LATENT, GraphSpec, Lowered

FLOAT16_MAX = 65_504
MOST_LEVELS = 8
"""Of 255, that an image may be from its float32 self in 16 bits."""


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


def levels_off(file: Path, spec: GraphSpec, precision: Precision, latents: Tensor, image: Tensor) -> int:
    """Largest difference from ``image`` where the graph's products really are computed in ``precision``."""
    engine = TorchCudaBackend(file, spec, precision=precision, device="cpu")
    return int(np.abs(engine.run({LATENT: latents.numpy()})[IMAGE].astype(int) - image.numpy()).max())


def pixels_are_finite(file: Path, dtype: Lowered, latents: Tensor) -> bool:
    """Whether what becomes whole numbers at a decoder's end is finite."""
    model = onnx.load(str(file))
    [to_levels] = [
        n for n in model.graph.node if n.op_type == "Cast" and n.attribute[0].i == onnx.TensorProto.UINT8
    ]
    model.graph.output.append(onnx.helper.make_tensor_value_info(to_levels.input[0], onnx.TensorProto.FLOAT, None))
    lower_products(model, dtype)
    outputs = OnnxModule(model)({LATENT: latents})
    return bool(torch.isfinite(outputs[to_levels.input[0]]).all())


def write_decoder(graph: LatentDecodeGraph, latents: Tensor, file: Path) -> GraphSpec:
    size = latents.shape[-2:]
    return write_checked(graph, [latents], graph.inputs(*size), graph.outputs(*size), file, 1, FEW_BATCHES)


def test_asked_for_float16_an_autoencoder_beyond_it_decodes_in_bfloat16(tmp_path: Path) -> None:
    """As SDXL's: activations that float16 cannot hold, between normalisations that bring them back."""
    (vae, graph), latents, file = small_decoder(), parity_latents(3, (4, 8, 8)), tmp_path / "decode.onnx"
    first = vae.decoder.conv_in
    first.weight *= 1e6
    assert float(first(latents).abs().max()) > FLOAT16_MAX
    spec, image = write_decoder(graph, latents, file), graph(latents)
    assert spec.lowered["float16"] is None
    lowered = spec.lowered["bfloat16"]
    assert lowered is not None
    assert lowered.max_abs_error <= MOST_LEVELS
    chosen = graph_precision(spec, "float16")
    assert chosen == "bfloat16"
    assert pixels_are_finite(file, chosen, latents)
    assert levels_off(file, spec, chosen, latents, image) <= MOST_LEVELS
    images = OpenVinoBackend(file, spec, precision=chosen).run({LATENT: latents.numpy()})
    assert np.abs(images[IMAGE].astype(int) - image.numpy()).max() <= MOST_LEVELS
    assert not pixels_are_finite(file, "float16", latents)
    assert levels_off(file, spec, "float16", latents, image) > 4 * MOST_LEVELS


def test_asked_for_float16_an_ordinary_autoencoder_decodes_in_it(tmp_path: Path) -> None:
    (_, graph), latents, file = small_decoder(), parity_latents(3, (4, 8, 8)), tmp_path / "decode.onnx"
    spec = write_decoder(graph, latents, file)
    assert graph_precision(spec, "float16") == "float16"
    assert levels_off(file, spec, "float16", latents, graph(latents)) <= 1


def test_a_decoder_that_float16_holds_for_noise_but_not_for_pictures_is_found(tmp_path: Path) -> None:
    """A wide blur: noise averages out in it, what is flat adds up."""
    (vae, graph), file = small_decoder(), tmp_path / "decode.onnx"
    first = vae.decoder.conv_in
    blur = nn.Conv2d(4, first.out_channels, 9, padding=4, bias=False).requires_grad_(False)
    blur.weight[:] = FLOAT16_MAX / 1000
    vae.decoder.conv_in = blur
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    assert lowered_parity(graph, [noise], reference_outputs(graph, [noise], "noise"), "float16") is not None
    spec = write_decoder(graph, parity_latents(3, (4, 16, 16)), file)
    assert spec.lowered["float16"] is None
    assert graph_precision(spec, "float16") == "bfloat16"


def test_a_product_that_comes_near_the_end_of_float16_counts_as_beyond_it() -> None:
    layer, x = nn.Linear(1, 1, bias=False).requires_grad_(False), torch.ones(2, 1)
    for largest, fits in ((FLOAT16_MAX / 5, True), (FLOAT16_MAX / 3, False)):
        layer.weight.fill_(largest)
        found = lowered_parity(layer, [x], reference_outputs(layer, [x], "x"), "float16")
        assert (found is not None) is fits
