"""Real handwritten digits: scikit-learn's 1,797 images of 8×8 pixels, 17 grey levels.

Source: UCI "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998), CC BY 4.0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor

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


def class_condition(labels: Tensor) -> Tensor:
    """(B, 1, 16) float32 one-hot condition tokens of (B,) labels; NULL_CLASS is the empty condition."""
    return torch.nn.functional.one_hot(labels, WIDTH).to(torch.float32).unsqueeze(1)
