"""Real handwritten digits: scikit-learn's 1,797 images of 8×8 pixels, 17 grey levels.

Source: UCI "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998), CC BY 4.0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from distill_jobs.data.source import Batch, Condition
from distill_jobs.draws import Draws

CLASSES = 10
NULL_CLASS = 10
WIDTH = 16
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LICENCE = "CC BY 4.0 (UCI Optical Recognition of Handwritten Digits, via scikit-learn)"


@dataclass(frozen=True)
class Digits:
    """images: (N, 1, 8, 8) float32 in [-1, 1]; labels: (N,) int64."""

    images: Tensor
    labels: Tensor

    @classmethod
    def load(cls) -> Digits:
        raw = load_digits()
        images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
        return cls(images, torch.tensor(raw.target, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> Digits:
        return Digits(self.images[rows], self.labels[rows])


def class_condition(labels: Tensor) -> Condition:
    """One float32 one-hot token, (B, 1, 16), for each of (B,) labels; NULL_CLASS is the empty condition."""
    return Condition(torch.nn.functional.one_hot(labels, WIDTH).to(torch.float32).unsqueeze(1))


@dataclass(frozen=True)
class DigitsSource:
    """Digits as training reads them: every epoch a fresh permutation of all images."""

    digits: Digits

    @property
    def shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.digits.images.shape
        return channels, height, width

    def batch(self, draws: Draws, update: int, size: int) -> Batch:
        picked = draws.indices(update, size, len(self.digits))
        return Batch(self.digits.images[picked], class_condition(self.digits.labels[picked]))

    def null(self, size: int) -> Condition:
        return class_condition(torch.full((size,), NULL_CLASS))
