"""One cell of an evaluation: a contender at one guidance_scale and one seed, sampled once and kept on disk.

All contenders of a seed share initial noise and classes; sample i of seed s is what a request with seed
s·1,000,000 + i draws. The images stay beside the result, so a measure added later needs no sampling.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill_jobs.checkpoint import write_folder
from distill_jobs.classifier import DigitClassifier
from distill_jobs.contenders import Contender
from distill_jobs.data.digits import CLASSES, class_condition
from distill_jobs.errors import JobError
from distill_jobs.features import FeatureSpace
from distill_jobs.metrics import class_agreement, coverage, frechet_distance, paired_distance, precision_recall
from distill_jobs.recipe import Recipe
from distill_jobs.sampling import SEED_STRIDE, Network

METRICS = ("frechet_distance", "class_agreement", "precision", "recall", "coverage", "paired_distance")
RESULT, IMAGES = "result.json", "images.safetensors"


class CellResult(BaseModel):
    """What one cell measured. fingerprint: hash of everything its images depend on; features: the space's."""

    model_config = ConfigDict(frozen=True)

    fingerprint: str
    seconds: float
    metrics: dict[str, float]
    features: str = ""


@dataclass(frozen=True)
class Cell:
    contender: Contender
    guidance_scale: float
    seed: int

    @property
    def key(self) -> str:
        """A file-name-safe identity: ``teacher-64-g2-s1``."""
        return f"{self.contender.key}-g{self.guidance_scale:g}-s{self.seed}"


@dataclass(frozen=True)
class Judge:
    """What all cells share.

    folder: where results are kept; real: (n, D) features of the full real set in ``space``; reference: the
    contender whose images the paired distance is measured to; its cells must be measured first. lenders: the
    result folders of other runs, from which equal cells are taken.
    """

    folder: Path
    recipe: Recipe
    classifier: DigitClassifier
    space: FeatureSpace
    real: Tensor
    reference: Contender
    lenders: tuple[Path, ...] = ()

    def fingerprint(self, cell: Cell) -> str:
        recipe = self.recipe
        digest = hashlib.sha256()
        for tensor in self.classifier.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        parts = (
            cell.key,
            cell.contender.weights_sha256(),
            self.reference.key,
            self.reference.weights_sha256(),
            digest.hexdigest(),
            recipe.schedule.model_dump_json(),
            recipe.clip,
            recipe.evaluation.samples,
            *filter(None, (each.limits(cell.guidance_scale) for each in (cell.contender, self.reference))),
        )
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def known(self, cell: Cell) -> CellResult | None:
        """A result measured before, here or in a lender, with the same weights and settings, or None.

        One that lacks a measure is completed from its images.
        """
        for folder in (self.folder, *self.lenders):
            kept = self._kept(folder / cell.key, cell)
            if kept is None:
                continue
            if folder != self.folder:
                self._write(cell, kept, folder / cell.key / IMAGES)
            return kept if self._complete(kept) else self._completed(cell, kept)
        return None

    def measure(self, cell: Cell, network: Network, advance: Callable[[int], None]) -> CellResult:
        """Sample the cell, measure it and keep both. advance: told the evaluations of every batch."""
        started = time.monotonic()
        images = self._sample(cell, network, advance)
        reference = (
            images if cell.contender == self.reference else self._images(replace(cell, contender=self.reference))
        )
        metrics = {**self._measures(images), "paired_distance": paired_distance(images.numpy(), reference.numpy())}
        seconds, fingerprint = time.monotonic() - started, self.fingerprint(cell)
        result = CellResult(fingerprint=fingerprint, seconds=seconds, metrics=metrics, features=self.space.identity)
        self._write(cell, result, images)
        return result

    def _measures(self, images: Tensor) -> dict[str, float]:
        """All measures but the paired distance of (n, C, H, W) images."""
        with torch.inference_mode():
            _, logits = self.classifier(images)
        real, features = self.real.numpy(), self.space.of(images).numpy()
        precision, recall = precision_recall(real, features)
        return {
            "frechet_distance": frechet_distance(features, real),
            "class_agreement": class_agreement(logits.argmax(dim=1).numpy(), self._labels().numpy()),
            "precision": precision,
            "recall": recall,
            "coverage": coverage(real, features),
        }

    def _complete(self, kept: CellResult) -> bool:
        return kept.features == self.space.identity and set(METRICS) <= set(kept.metrics)

    def _kept(self, folder: Path, cell: Cell) -> CellResult | None:
        """A result in ``folder`` that is complete or can be completed; the reference's needs its images."""
        if not (folder / RESULT).is_file():
            return None
        result = CellResult.model_validate_json((folder / RESULT).read_bytes())
        if result.fingerprint != self.fingerprint(cell):
            return None
        spared = self._complete(result) and cell.contender != self.reference
        return result if spared or (folder / IMAGES).is_file() else None

    def _completed(self, cell: Cell, kept: CellResult) -> CellResult:
        images = self._images(cell)
        metrics = {**kept.metrics, **self._measures(images)}
        result = kept.model_copy(update={"metrics": metrics, "features": self.space.identity})
        self._write(cell, result, images)
        return result

    def _write(self, cell: Cell, result: CellResult, images: Tensor | Path) -> None:
        """Keep a result and its images; a path is copied, where it is a file."""

        def fill(staging: Path) -> None:
            (staging / RESULT).write_text(result.model_dump_json(indent=1), encoding="utf-8")
            if isinstance(images, Tensor):
                save_file({"images": images}, staging / IMAGES)
            elif images.is_file():
                shutil.copyfile(images, staging / IMAGES)

        write_folder(self.folder / cell.key, fill)

    def _sample(self, cell: Cell, network: Network, advance: Callable[[int], None]) -> Tensor:
        """(n, 1, 8, 8) images as decoded: within -1 … 1."""
        labels, batches = self._labels(), []
        first_seed, size = cell.seed * SEED_STRIDE, self.recipe.evaluation.batch_size
        for first in range(0, len(labels), size):
            classes = labels[first : first + size]
            seeds = range(first_seed + first, first_seed + first + len(classes))
            images = cell.contender.draw(network, self.recipe, class_condition(classes), seeds)
            if not torch.isfinite(images).all():
                raise JobError(f"{cell.key}: the network gives NaN or infinity; train it again")
            batches.append(images.clamp(-1, 1))
            advance(len(classes) * cell.contender.evaluations(cell.guidance_scale))
        return torch.cat(batches)

    def _labels(self) -> Tensor:
        """(n,) the class every sample is asked to be."""
        return torch.arange(self.recipe.evaluation.samples) % CLASSES

    def _images(self, cell: Cell) -> Tensor:
        return load_file(self.folder / cell.key / IMAGES)["images"]
