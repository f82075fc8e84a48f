"""The digits classifier of the first example, as a benchmark."""

from __future__ import annotations

from pathlib import Path

import torch
from _digits import CHANNELS, Classifier, load_digits, train
from benchmarks._problem import Benchmark

import torchdiffeq_hyper as tdh


def digits(folder: Path) -> Benchmark:
    """Return the benchmark: fitted on training images, measured on test images."""
    data = load_digits()
    path = folder / "model.pt"
    if path.is_file():
        model = Classifier()
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        model = train(data, epochs=20)
        torch.save(model.state_dict(), path)
    with torch.no_grad():
        fit_y0, test_y0 = model.encode(data.train_images), model.encode(data.test_images)
    return Benchmark(
        name="digits",
        title="digits classifier, two 3x3 convolutions on (12, 8, 8)",
        func=model.eval().field,
        fit_y0=fit_y0,
        test_y0=test_y0[:512],
        span=(0.0, 1.0),
        fit_seconds=20.0,
        hypernet=lambda: tdh.hypernets.Conv(channels=CHANNELS, inputs=("y", "t")),
    )
