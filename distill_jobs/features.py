"""The space in which distributions of images are compared: the digit classifier, or a local Inception or CLIP."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_jobs.classifier import DigitClassifier
from distill_jobs.errors import JobError, first_line
from distill_jobs.pipelines.checks import VOCABULARIES
from distill_jobs.sections import EvaluationSection

IMAGES_AT_ONCE = 250
ONNX_SIDE_PX = 299
CLIP_FILES = ("model.safetensors", "preprocessor_config.json", "config.json")


@dataclass(frozen=True)
class FeatureSpace:
    """name: in reports. identity: hash of the weights. extract: (B, C, H, W) images in -1 … 1 to (B, D) float32.

    told: captions to (n, D) embeddings that stand near those of their images; None for spaces without words.
    """

    name: str
    identity: str
    extract: Callable[[Tensor], Tensor]
    told: Callable[[Sequence[str]], Tensor] | None = None

    @property
    def metric(self) -> str:
        """What a Fréchet distance in it is, spelled out."""
        return f"Fréchet distance in {self.name} features"

    def of(self, images: Tensor) -> Tensor:
        """(n, D) features of (n, C, H, W) images, some at a time."""
        with torch.inference_mode():
            return torch.cat([self.extract(batch) for batch in torch.split(images, IMAGES_AT_ONCE)])


def feature_space(settings: EvaluationSection, classifier: DigitClassifier) -> FeatureSpace:
    """The recipe's choice. Raises: JobError saying what is missing or not usable."""
    if settings.features_path is None:
        parts = (tensor.numpy().tobytes() for tensor in classifier.state_dict().values())
        return FeatureSpace("digit-classifier", _digest(parts), lambda images: classifier(images)[0])
    return local_space(settings.features, Path(settings.features_path))


def local_space(features: str, path: Path) -> FeatureSpace:
    """That of a file or folder the user has. Raises: JobError saying what is missing or not usable."""
    return _clip(path) if features == "clip" else _inception(path)


def _inception(path: Path) -> FeatureSpace:
    if not path.is_file():
        raise JobError(f"evaluation.features_path {path} is no file; inception needs a TorchScript or an ONNX file")
    identity = _digest([path.read_bytes()])
    extract = _onnx(path) if path.suffix == ".onnx" else _torchscript(path)
    return FeatureSpace("Inception", identity, extract)


def _torchscript(path: Path) -> Callable[[Tensor], Tensor]:
    """A file called as the one of the FID references is: grey levels in, ``return_features``; it resizes itself."""
    try:
        module = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
        module.train(False)
    except RuntimeError as error:
        raise JobError(f"evaluation.features_path {path} is no TorchScript file: {first_line(error)}") from None

    def extract(images: Tensor) -> Tensor:
        levels = ((_three_channels(images).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        try:
            found = torch.as_tensor(module(levels, return_features=True))
        except (RuntimeError, TypeError) as error:
            raise JobError(
                f"evaluation.features_path {path} cannot be called on uint8 images with return_features: "
                f"{first_line(error)}"
            ) from None
        return _rows(path, found)

    return extract


def _onnx(path: Path) -> Callable[[Tensor], Tensor]:
    """A graph of one input, (B, 3, 299, 299) float32 in -1 … 1, whose first output is (B, D)."""
    import onnxruntime  # noqa: PLC0415 - heavy, and needed for such a file alone

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common base
        raise JobError(f"evaluation.features_path {path} cannot be read as ONNX: {first_line(error)}") from None
    (name, *others) = [tensor.name for tensor in session.get_inputs()]
    if others:
        raise JobError(f"evaluation.features_path {path} has more than one input: {', '.join([name, *others])}")

    def extract(images: Tensor) -> Tensor:
        size = (ONNX_SIDE_PX, ONNX_SIDE_PX)
        resized = torch.nn.functional.interpolate(_three_channels(images), size, mode="bilinear", antialias=True)
        try:
            found = torch.from_numpy(session.run(None, {name: resized.numpy()})[0])
        except Exception as error:  # as above
            raise JobError(
                f"evaluation.features_path {path} cannot be run on images of 3 × {ONNX_SIDE_PX} × {ONNX_SIDE_PX}: "
                f"{first_line(error)}"
            ) from None
        return _rows(path, found)

    return extract


def _clip(folder: Path) -> FeatureSpace:
    """Projected image embeddings of a CLIP saved by transformers, resized and normalised as its folder says."""
    from transformers import CLIPModel, CLIPVisionModelWithProjection  # noqa: PLC0415 - heavy, needed here alone

    weights, preparation, config_file = (folder / name for name in CLIP_FILES)
    for file in (weights, preparation, config_file):
        if not file.is_file():
            raise JobError(f"evaluation.features_path {folder} is no CLIP folder: it has no {file.name}")
    try:
        config, settings = (json.loads(file.read_text(encoding="utf-8")) for file in (config_file, preparation))
        kind = CLIPModel if config["model_type"] == "clip" else CLIPVisionModelWithProjection
        model = kind.from_pretrained(folder, local_files_only=True)
        side = int(config.get("vision_config", config)["image_size"])
        mean, std = (torch.tensor(settings[name])[:, None, None] for name in ("image_mean", "image_std"))
        told = _caption_embedding(folder, model) if kind is CLIPModel else None
    except Exception as error:  # what the libraries make of damaged files has no common base
        raise JobError(f"evaluation.features_path {folder} is no CLIP folder: {first_line(error)}") from None
    model.train(False)

    def extract(images: Tensor) -> Tensor:
        unit = (_three_channels(images).clamp(-1, 1) + 1) / 2
        resized = torch.nn.functional.interpolate(unit, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        pooled = model.vision_model(pixel_values=(resized - mean) / std).pooler_output
        return torch.as_tensor(model.visual_projection(pooled))

    return FeatureSpace("CLIP", _digest([weights.read_bytes()]), extract, told)


def _caption_embedding(folder: Path, model: Any) -> Callable[[Sequence[str]], Tensor] | None:
    """Projected text embeddings of a CLIPModel; None where its folder has no words."""
    from transformers import CLIPTokenizer  # noqa: PLC0415 - heavy, needed here alone

    if not any(all((folder / name).is_file() for name in files) for files in VOCABULARIES):
        return None
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    length = int(model.config.text_config.max_position_embeddings)

    def told(captions: Sequence[str]) -> Tensor:
        rows = tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        with torch.inference_mode():
            return torch.as_tensor(model.text_projection(model.text_model(**rows).pooler_output))

    return told


def _rows(path: Path, features: Tensor) -> Tensor:
    """(B, D) float32. Raises: JobError where they are of another shape, as maps that nobody averaged are."""
    if features.ndim != 2:
        raise JobError(
            f"evaluation.features_path {path} gives {tuple(features.shape)} and not (images, features); its output "
            "must be one row an image"
        )
    return features.float()


def _three_channels(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
