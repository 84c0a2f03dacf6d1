"""One cell of an evaluation: a contender at one guidance_scale and one seed, measured once and kept on disk.

All contenders of a seed share initial noise and classes; sample i of seed s is what a request with seed
s·1,000,000 + i draws.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
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
from distill_jobs.metrics import class_agreement, frechet_distance, paired_distance
from distill_jobs.recipe import Recipe
from distill_jobs.sampling import Network, sample

SEED_STRIDE = 1_000_000
METRICS = ("frechet_distance", "class_agreement", "paired_distance")
RESULT, IMAGES = "result.json", "images.safetensors"


class CellResult(BaseModel):
    """What one cell measured. fingerprint: hash of everything the result depends on."""

    model_config = ConfigDict(frozen=True)

    fingerprint: str
    seconds: float
    metrics: dict[str, float]


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

    folder: where results are kept; real: (n, D) classifier features of the full real set; reference: the
    contender whose images the paired distance is measured to; its cells must be measured first.
    """

    folder: Path
    recipe: Recipe
    classifier: DigitClassifier
    real: Tensor
    reference: Contender

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
        )
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def known(self, cell: Cell) -> CellResult | None:
        """A result measured before with the same weights and settings, or None."""
        file = self.folder / cell.key / RESULT
        if not file.is_file():
            return None
        result = CellResult.model_validate_json(file.read_bytes())
        return result if result.fingerprint == self.fingerprint(cell) else None

    def measure(self, cell: Cell, network: Network, advance: Callable[[int], None]) -> CellResult:
        """Sample the cell, measure it and keep the result. advance: told the evaluations of every batch."""
        started = time.monotonic()
        labels = torch.arange(self.recipe.evaluation.samples) % CLASSES
        images = self._sample(cell, network, labels, advance)
        with torch.inference_mode():
            features, logits = self.classifier(images)
        reference = images if cell.contender == self.reference else self._reference_images(cell)
        metrics = {
            "frechet_distance": frechet_distance(features.numpy(), self.real.numpy()),
            "class_agreement": class_agreement(logits.argmax(dim=1).numpy(), labels.numpy()),
            "paired_distance": paired_distance(images.numpy(), reference.numpy()),
        }
        result = CellResult(fingerprint=self.fingerprint(cell), seconds=time.monotonic() - started, metrics=metrics)

        def fill(staging: Path) -> None:
            (staging / RESULT).write_text(result.model_dump_json(indent=1), encoding="utf-8")
            if cell.contender == self.reference:
                save_file({"images": images}, staging / IMAGES)

        write_folder(self.folder / cell.key, fill)
        return result

    def _sample(self, cell: Cell, network: Network, labels: Tensor, advance: Callable[[int], None]) -> Tensor:
        """(n, 1, 8, 8) images as decoded: within -1 … 1."""
        plan = cell.contender.plan(self.recipe)
        batches = []
        first_seed, size = cell.seed * SEED_STRIDE, self.recipe.evaluation.batch_size
        for first in range(0, len(labels), size):
            classes = labels[first : first + size]
            seeds = range(first_seed + first, first_seed + first + len(classes))
            images = sample(network, plan, class_condition(classes), seeds, cell.contender.shape)
            if not torch.isfinite(images).all():
                raise JobError(f"{cell.key}: the network gives NaN or infinity; train it again")
            batches.append(images.clamp(-1, 1))
            advance(len(classes) * cell.contender.computed(cell.guidance_scale))
        return torch.cat(batches)

    def _reference_images(self, cell: Cell) -> Tensor:
        twin = Cell(self.reference, cell.guidance_scale, cell.seed)
        return load_file(self.folder / twin.key / IMAGES)["images"]
