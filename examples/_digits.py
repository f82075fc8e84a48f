"""scikit-learn's real 8x8 digits and a small convolutional Neural ODE to classify them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchdiffeq import odeint
from tqdm import tqdm

import torchdiffeq_hyper as tdh

CHANNELS = 12


@dataclass(frozen=True)
class Digits:
    """Images (n, 1, 8, 8) scaled to [-1, 1] and labels (n,), one half each."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(seed: int = 0) -> Digits:
    """Return the 1,797 digits, split at random into 898 for training and 899 for testing."""
    from sklearn.datasets import load_digits as sklearn_digits

    raw = sklearn_digits()
    images = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(raw.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order], labels[order]
    half = len(images) // 2
    return Digits(images[:half], labels[:half], images[half:], labels[half:])


class Field(nn.Module):
    """dy/dt of a (batch, 12, 8, 8) state: two 3x3 convolutions, with time as a channel."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.enter = nn.Conv2d(CHANNELS + 1, width, 3, padding=1)
        self.leave = nn.Conv2d(width + 1, CHANNELS, 3, padding=1)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Return the derivative."""
        clock = t.to(y.dtype).expand(len(y), 1, *y.shape[2:])
        y = torch.tanh(self.enter(torch.cat([y, clock], 1)))
        out: Tensor = self.leave(torch.cat([y, clock], 1))
        return out


class Classifier(nn.Module):
    """Add empty channels to the image, flow it from t = 0 to 1, read the class off."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.ZeroPad3d((0, 0, 0, 0, 0, CHANNELS - 1))
        self.field = Field()
        self.decode = nn.Sequential(
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(CHANNELS * 16, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (batch, 10)."""
        y0, t = self.encode(images), torch.tensor([0.0, 1.0])
        out: Tensor = self.decode(
            odeint(self.field, y0, t, method="dopri5", rtol=1e-3, atol=1e-3)[-1]
        )
        return out


def train(digits: Digits, epochs: int, seed: int = 0, error_weight: float = 0.0) -> Classifier:
    """Train a classifier with dopri5; shows progress.

    Args:
        digits: the data.
        epochs: passes over the training images.
        seed: seeds the weights and the order of the images.
        error_weight: weight of dopri5's error estimates in the loss; 0 leaves them out.
    """
    torch.manual_seed(seed)
    model = Classifier()
    batch = 128
    n_batches = len(digits.train_images) // batch
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=epochs * n_batches)
    bar = tqdm(range(epochs), desc="training the Neural ODE", unit="epoch")
    for _ in bar:
        order = torch.randperm(len(digits.train_images))
        for index in order[: n_batches * batch].chunk(n_batches):
            optimizer.zero_grad()
            with tdh.record() if error_weight else nullcontext() as recorded:
                logits = model(digits.train_images[index])
            loss = nn.functional.cross_entropy(logits, digits.train_labels[index])
            if recorded is not None:
                loss = loss + error_weight / batch * recorded.error_penalty()
            loss.backward()
            optimizer.step()
            schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()
