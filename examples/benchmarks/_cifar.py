"""CIFAR-10 images and a convolutional Neural ODE of the size of the hypersolver paper's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks._problem import Benchmark
from torch import Tensor, nn
from torchdiffeq import odeint
from tqdm import tqdm

import torchdiffeq_hyper as tdh

CHANNELS = 20
CLASSES = 10
IMAGE_BYTES = 3 * 32 * 32
FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
BATCH = 64
STEPS = 4
SMALL_EPOCHS, EPOCHS = 10, 11


@dataclass(frozen=True)
class Cifar:
    """Images (n, 3, 32, 32) in [-1, 1] and labels (n,): four files to train, one to test."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_cifar(folder: Path) -> Cifar:
    """Read the binary version of CIFAR-10: a byte of label, then 3,072 of image, a record.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is not made of such records.
    """
    batches = [_read(folder / name) for name in FILES]
    images, labels = (list(part) for part in zip(*batches, strict=True))
    return Cifar(torch.cat(images[:-1]), torch.cat(labels[:-1]), images[-1], labels[-1])


def _read(path: Path) -> tuple[Tensor, Tensor]:
    if not path.is_file():
        message = (
            f"{path} is not there. The binary version of CIFAR-10 is published on "
            "https://www.cs.toronto.edu/~kriz/cifar.html; unpack it and pass the folder that "
            "holds cifar-10-batches-bin as --data."
        )
        raise FileNotFoundError(message)
    raw = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    if len(raw) == 0 or len(raw) % (1 + IMAGE_BYTES):
        message = f"{path} has {len(raw)} bytes, not a multiple of {1 + IMAGE_BYTES}."
        raise ValueError(message)
    records = raw.view(-1, 1 + IMAGE_BYTES)
    images = records[:, 1:].reshape(-1, 3, 32, 32).float() / 127.5 - 1
    return images, records[:, 0].long()


class Field(nn.Module):
    """dy/dt of a (batch, 20, 32, 32) state: three 3x3 convolutions, 50 channels between."""

    def __init__(self, width: int = 50) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(CHANNELS, width, 3, padding=1),
            nn.Softplus(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.Softplus(),
            nn.Conv2d(width, CHANNELS, 3, padding=1),
        )
        for layer in self.net:
            if isinstance(layer, nn.Conv2d):
                # torch's own start gives a nearly linear flow, solved by a few Euler steps.
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Return the derivative, which does not depend on time."""
        out: Tensor = self.net(y)
        return out


class Classifier(nn.Module):
    """Lift the image to 20 channels, flow it from t = 0 to 1, pool, read the class off."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.field = Field()
        self.decode = nn.Sequential(
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * CHANNELS, CLASSES)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (batch, 10)."""
        y0, t = self.encode(images), torch.tensor([0.0, 1.0])
        options = {"step_size": 1 / STEPS}
        out: Tensor = self.decode(odeint(self.field, y0, t, method="rk4", options=options)[-1])
        return out


def train(data: Cifar, checkpoint: Path) -> Classifier:
    """Train a classifier, at half the resolution first; goes on from the checkpoint."""
    torch.manual_seed(0)
    model = Classifier()
    n_batches = len(data.train_images) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=EPOCHS * n_batches)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    done = 0
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        done = saved["epochs"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    bar = tqdm(
        range(done, EPOCHS), desc="training on CIFAR-10", unit="epoch", disable=done >= EPOCHS
    )
    for epoch in bar:
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(len(data.train_images), generator=generator)
        for index in order[: n_batches * BATCH].chunk(n_batches):
            images = data.train_images[index]
            if torch.rand((), generator=generator) < 0.5:
                images = images.flip(3)
            if epoch < SMALL_EPOCHS:
                images = nn.functional.avg_pool2d(images, 2)
            loss = nn.functional.cross_entropy(model(images), data.train_labels[index])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        saved = {name: part.state_dict() for name, part in parts.items()}
        torch.save({"epochs": epoch + 1, **saved}, checkpoint.with_suffix(".new"))
        # At once, or not at all: an interruption leaves the epoch before.
        checkpoint.with_suffix(".new").replace(checkpoint)
    return model.eval()


def cifar(data: Path, folder: Path) -> Benchmark:
    """Return the benchmark: fitted on training images, measured on test images."""
    images = load_cifar(data / "cifar-10-batches-bin")
    model = train(images, folder / "model.pt")
    with torch.no_grad():
        fit_y0 = model.encode(images.train_images[:512])
        test_y0 = model.encode(images.test_images[:128])
    return Benchmark(
        name="cifar",
        title="CIFAR-10 classifier, 3x3 convolutions 20-50-50-20 on (20, 32, 32)",
        func=model.field,
        fit_y0=fit_y0,
        test_y0=test_y0,
        span=(0.0, 1.0),
        fit_seconds=60.0,
        fit_tolerance=1e-5,
        repeats=5,
        fit_batch=16,
        hypernet=lambda: tdh.hypernets.Conv(channels=CHANNELS, inputs=("y", "t")),
    )
