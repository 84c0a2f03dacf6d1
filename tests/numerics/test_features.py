"""Feature spaces from local files: CLIP, TorchScript, ONNX, and what is said when they are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from distill_jobs.classifier import DigitClassifier
from distill_jobs.errors import JobError
from distill_jobs.features import FeatureSpace, feature_space
from distill_jobs.recipe import EvaluationSection
from tests.support import tiny_pipelines as tiny

IMAGES = torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def space(features: str, path: Path) -> FeatureSpace:
    settings: Any = {"features": features, "features_path": str(path)}
    return feature_space(EvaluationSection(**settings), DigitClassifier())


class GreyMean(nn.Module):
    """Channel means of uint8 images, asked for as features."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        assert return_features
        assert images.dtype == torch.uint8
        return images.float().mean(dim=(2, 3))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("clip")
    vision = {**SMALL, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    config = CLIPConfig(text_config={**SMALL, "vocab_size": 99}, vision_config=vision, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**size).save_pretrained(folder)
    return folder


def test_clip_features_are_those_of_transformers_own_preparation(clip_folder: Path) -> None:
    from transformers import CLIPImageProcessorPil

    found = space("clip", clip_folder)
    features = found.of(IMAGES)
    assert features.shape == (7, 12)
    assert found.metric == "Fréchet distance in CLIP features"
    levels = ((IMAGES.expand(-1, 3, -1, -1) + 1) * 127.5).round().to(torch.uint8).numpy()
    prepared = CLIPImageProcessorPil.from_pretrained(clip_folder)(images=list(levels), return_tensors="pt")
    with torch.inference_mode():
        model = CLIPModel.from_pretrained(clip_folder)
        pooled = model.vision_model(pixel_values=prepared["pixel_values"]).pooler_output
        expected = model.visual_projection(pooled)
    torch.testing.assert_close(features, expected, rtol=0, atol=0.05 * float(expected.std()))


def test_clip_embeds_captions_as_transformers_does(clip_folder: Path, tmp_path: Path) -> None:
    folder, captions = tiny.clip(tmp_path / "clip"), ["a cat", "a dog at night"]
    told = space("clip", folder).told
    assert told is not None
    rows = CLIPTokenizer.from_pretrained(folder)(captions, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = CLIPModel.from_pretrained(folder).get_text_features(**rows)
    torch.testing.assert_close(told(captions), getattr(expected, "pooler_output", expected), rtol=0, atol=1e-6)
    assert told(["dog " * 200]).shape == (1, 12)
    assert space("clip", clip_folder).told is None  # it has no words


def test_torchscript_is_called_as_the_fid_reference_is(tmp_path: Path) -> None:
    file = tmp_path / "inception.pt"
    torch.jit.script(GreyMean()).save(file)
    found = space("inception", file)
    assert found.metric == "Fréchet distance in Inception features"
    grey = ((IMAGES + 1) * 127.5).round().mean(dim=(2, 3)).expand(-1, 3)
    torch.testing.assert_close(found.of(IMAGES), grey)


def maxima(file: Path, side: int = 299, keepdims: int = 0) -> Path:
    """An ONNX file that gives the largest value of each channel."""
    rows = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["rows", 3, side, side])]
    found = [helper.make_tensor_value_info("found", TensorProto.FLOAT, ["rows", 3, 1, 1][: 4 if keepdims else 2])]
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])
    node = helper.make_node("ReduceMax", ["images", "axes"], ["found"], keepdims=keepdims)
    graph = helper.make_graph([node], "max", rows, found, [axes])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), file)
    return file


def test_onnx_gets_the_images_in_its_size(tmp_path: Path) -> None:
    flat = torch.linspace(-1, 1, 7)[:, None, None, None].expand(-1, 1, 8, 8)
    features = space("inception", maxima(tmp_path / "inception.onnx")).of(flat)
    torch.testing.assert_close(features, flat[:, 0, 0, :1].expand(-1, 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"side": 224}, "cannot be run on images of 3 × 299 × 299"), ({"keepdims": 1}, r"gives \(7, 3, 1, 1\)")],
)
def test_a_graph_of_other_inputs_or_outputs_is_said(options: dict[str, int], reason: str, tmp_path: Path) -> None:
    found = space("inception", maxima(tmp_path / "other.onnx", **options))
    with pytest.raises(JobError, match=f"evaluation.features_path .*other.onnx {reason}"):
        found.of(IMAGES)


@pytest.mark.parametrize(
    ("file", "text"), [("vocab.json", "{}"), ("preprocessor_config.json", '{"image_mean": 1, "image_std": 1}')]
)
def test_a_clip_folder_with_a_file_of_something_else_is_refused(file: str, text: str, tmp_path: Path) -> None:
    (tiny.clip(tmp_path / "clip") / file).write_text(text, encoding="utf-8")
    with pytest.raises(JobError, match="is no CLIP folder"):
        space("clip", tmp_path / "clip")


def test_another_file_is_another_space(tmp_path: Path) -> None:
    for name, module in (("a.pt", GreyMean()), ("b.pt", GreyMean())):
        module.register_buffer("unused", torch.tensor(ord(name[0])))
        torch.jit.script(module).save(tmp_path / name)
    one, other = (space("inception", tmp_path / name) for name in ("a.pt", "b.pt"))
    assert one.identity != other.identity
    assert one.identity == space("inception", tmp_path / "a.pt").identity


@pytest.mark.parametrize(
    ("features", "name", "reason"),
    [
        ("clip", "missing", r"is no CLIP folder: it has no model\.safetensors"),
        ("inception", "missing.pt", "is no file"),
        ("inception", "bad.pt", "is no TorchScript file"),
        ("inception", "bad.onnx", "cannot be read as ONNX"),
    ],
)
def test_what_is_missing_or_wrong_is_said(tmp_path: Path, features: str, name: str, reason: str) -> None:
    for bad in ("bad.pt", "bad.onnx"):
        (tmp_path / bad).write_bytes(b"not a model")
    with pytest.raises(JobError, match=f"evaluation.features_path .*{name} {reason}"):
        space(features, tmp_path / name)


def test_a_clip_folder_without_weights_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / file).write_bytes((clip_folder / file).read_bytes())
    with pytest.raises(JobError, match=r"has no model\.safetensors"):
        space("clip", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\0")
    with pytest.raises(JobError, match="is no CLIP folder"):
        space("clip", tmp_path)


@pytest.mark.parametrize("wrong", [{"features": "clip"}, {"features_path": "somewhere"}])
def test_a_path_goes_with_features_that_need_one(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="features_path goes with"):
        EvaluationSection(**wrong)
