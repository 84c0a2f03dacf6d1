"""The graphs of the real architectures, scaled down: exported as bundles hold them, with random weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distill_jobs.graphs import StepGraph
from distill_jobs.latent_sections import DecoderSection
from distill_jobs.onnx_export import write_graph
from distill_jobs.pipelines.checks import open_folder
from distill_jobs.pipelines.folder import PipelineFolder
from distill_jobs.pipelines.graphs import LatentDecodeGraph
from distill_jobs.pipelines.packing import Packing
from distill_jobs.pipelines.surroundings import surroundings_of
from distill_jobs.pipelines.teacher import load_network
from distill_jobs.pipelines.tiny_decoder import TinyDecoder, new_tiny
from engines.manifest import TOKENS, GraphSpec, Licences, Parity, TensorSpec
from tests.support import tiny_pipelines as tiny

ONE_LEVEL: dict[str, Any] = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D",),
    "time_cond_proj_dim": 256,
}
"""Every kind of layer of the true networks, each once."""

AS_TRUE: dict[str, Any] = {"mid_block_type": "UNetMidBlock2DCrossAttn", "up_block_types": ("CrossAttnUpBlock2D",)}
"""And every kind of block."""


@dataclass(frozen=True)
class Exported:
    """One graph: what it is of, its file, and its manifest entry."""

    name: str
    file: Path
    spec: GraphSpec


def pipeline_folder(kind: str, work: Path) -> PipelineFolder:
    """A stock pipeline folder of sd15, sd21 (predicts v, linear projections), sdxl or inpaint (sees masks)."""
    if kind == "sdxl":
        made: Any = tiny.sdxl(work / "parts", **ONE_LEVEL)
    else:
        changes = {"sd15": AS_TRUE, "sd21": {"use_linear_projection": True}, "inpaint": {"in_channels": 9}}[kind]
        prediction = "v_prediction" if kind == "sd21" else "epsilon"
        made = tiny.sd(work / "parts", prediction=prediction, **{**ONE_LEVEL, **changes})
    made.save_pretrained(work / kind, safe_serialization=True)
    return open_folder(work / kind)


def step_of(kind: str, work: Path) -> Exported:
    """The step graph of a student of this architecture."""
    folder = pipeline_folder(kind, work)
    packing = Packing.of(folder)
    graph = StepGraph(load_network(folder).requires_grad_(False), packing.unpack)
    side = tiny.LATENT_PX
    return _export(f"{kind} step", graph, graph.inputs(side, side, packing.rows), graph.outputs(side, side), work)


def surroundings(kind: str, work: Path, graphs: Sequence[str]) -> Iterator[Exported]:
    """Of this architecture, the condition, decode, decode_tiny and encode graphs that are named."""
    around = surroundings_of(pipeline_folder(kind, work), Licences(teacher="none", data="none"))
    side = tiny.LATENT_PX
    condition, decode, encode = around.condition, around.decode, around.encode
    shape = decode.decoder.channels, decode.decoder.pixels_per_latent
    tiny_decode = LatentDecodeGraph(TinyDecoder(new_tiny(DecoderSection(updates=1, width=8), *shape, 0)).eval())
    made = {
        "condition": (condition, condition.inputs(), condition.outputs()),
        "decode": (decode, decode.inputs(side, side), decode.outputs(side, side)),
        "decode_tiny": (tiny_decode, tiny_decode.inputs(side, side), tiny_decode.outputs(side, side)),
        "encode": (encode, encode.inputs(side, side), encode.outputs(side, side)),
    }
    for name in graphs:
        yield _export(f"{kind} {name}", *made[name], work)


def random_rows(exported: Exported, count: int) -> dict[str, NDArray[Any]]:
    """Inputs of a graph. Prompts end after one word, two, three …"""
    rows = {spec.name: _example(spec, count).numpy() for spec in exported.spec.inputs}
    for i, tokens in enumerate(rows.get(TOKENS, ())):
        tokens[i + 1] = tiny.vocabulary()[tiny.END]
    return rows


def _export(
    name: str, graph: nn.Module, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], work: Path
) -> Exported:
    file = work / f"{name.replace(' ', '_')}.onnx"
    write_graph(graph, [_example(spec, 2) for spec in inputs], inputs, outputs, file)
    parity = Parity(reference="none", max_abs_error=0, mean_abs_error=0, rows=0)
    return Exported(name, file, GraphSpec(file=file.name, inputs=inputs, outputs=outputs, parity=parity))


def _example(spec: TensorSpec, rows: int) -> Tensor:
    shape = (rows, *spec.shape[1:])
    if spec.dtype == "float32":
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))
    high = 256 if spec.dtype == "uint8" else 100
    return torch.randint(0, high, shape, dtype=getattr(torch, spec.dtype))
