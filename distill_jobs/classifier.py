"""The digit classifier whose penultimate layer is the feature space of the quality tables.

Small, trained in seconds on the training split with a fixed seed, saved as safetensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill_jobs.checkpoint import write_folder
from distill_jobs.data.digits import CLASSES, Digits

FEATURES = 64
EPOCHS = 30
BATCH = 64
CLASSIFIER = Path("classifier") / "classifier.safetensors"


class DigitClassifier(nn.Module):
    """(B, 1, 8, 8) images in -1 … 1 to features and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(64 * 4 * 4, FEATURES),
            nn.SiLU(),
        )
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(features (B, 64), logits (B, 10)) of images: (B, 1, 8, 8)."""
        features = self.body(images)
        return features, self.head(features)


def split_digits(digits: Digits, seed: int = 0) -> tuple[Digits, Digits]:
    """(training, held-out) digits, drawn with ``seed``: four fifths and one fifth."""
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    held_out, train = order[: len(digits) // 5], order[len(digits) // 5 :]
    return (
        Digits(digits.images[train], digits.labels[train]),
        Digits(digits.images[held_out], digits.labels[held_out]),
    )


def train_classifier(train: Digits, *, seed: int = 0, epochs: int = EPOCHS) -> DigitClassifier:
    """A classifier that depends on the data and the seed alone; the global random state is left as it was."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier()
        updates = epochs * -(-len(train) // BATCH)
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=2e-3, total_steps=updates)
        for _ in range(epochs):
            order = torch.randperm(len(train), generator=generator)
            for start in range(0, len(train), BATCH):
                rows = order[start : start + BATCH]
                _, logits = model(train.images[rows])
                loss = nn.functional.cross_entropy(logits, train.labels[rows], label_smoothing=0.05)
                optimiser.zero_grad()
                torch.autograd.backward(loss)
                optimiser.step()
                rate.step()
    return model.eval().requires_grad_(False)


def accuracy(model: DigitClassifier, data: Digits) -> float:
    """Fraction of images classified as labelled."""
    with torch.inference_mode():
        _, logits = model(data.images)
    return float((logits.argmax(dim=1) == data.labels).float().mean())


def save_classifier(model: DigitClassifier, path: Path) -> None:
    """In one move with its folder. Raises: StorageError."""
    write_folder(path.parent, lambda staging: save_file(model.state_dict(), staging / path.name))


def load_classifier(path: Path) -> DigitClassifier:
    model = DigitClassifier()
    model.load_state_dict(load_file(path))
    return model.eval().requires_grad_(False)


def classifier_of(run_dir: Path, digits: Digits, lenders: Sequence[Path] = ()) -> DigitClassifier:
    """The run's classifier; on first use that of the first lending run that has one, else a new one, is saved."""
    path = run_dir / CLASSIFIER
    if not path.is_file():
        lent = next((lender / CLASSIFIER for lender in lenders if (lender / CLASSIFIER).is_file()), None)
        model = load_classifier(lent) if lent else train_classifier(split_digits(digits)[0])
        save_classifier(model, path)
    return load_classifier(path)
