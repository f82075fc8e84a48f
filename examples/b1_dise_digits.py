"""Error-regularised training and per-sample integrators on real digits, after DISE.

Trains a convolutional Neural ODE on scikit-learn's digits with and without dopri5's error
estimates in the loss, fits a selector that sends each image to the cheapest integrator that
still classifies it rightly, and prints accuracy against calls of the vector field.

    python examples/b1_dise_digits.py

Writes dise.md and dise.png to the folder out/.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from _digits import Classifier, Digits, load_digits, train
from torch import Tensor
from torchdiffeq import odeint

import torchdiffeq_hyper as tdh

T = torch.tensor([0.0, 1.0])
TOLERANCE = 1e-3
ERROR_WEIGHT = 60.0
CANDIDATES = (
    tdh.Candidate("euler", steps=2),
    tdh.Candidate("midpoint", steps=2),
    tdh.Candidate("rk4", steps=2),
    tdh.Candidate("dopri5", rtol=TOLERANCE, atol=TOLERANCE),
)
NAMES = ("euler, 2 steps", "midpoint, 2 steps", "rk4, 2 steps", "dopri5")


@dataclass(frozen=True)
class Result:
    """One model on the test images: accuracy, mean calls of func an image, milliseconds."""

    accuracy: float
    nfe: float
    ms: float


def measure(model: Classifier, digits: Digits, dise: tdh.Dise | None = None) -> Result:
    """Classify the test images with dopri5, or as a selector decides."""
    y0 = model.encode(digits.test_images)
    method, options = ("dopri5", None) if dise is None else ("dise", {"dise": dise})

    def solve() -> Tensor:
        solution = odeint(
            model.field, y0, T, method=method, options=options, rtol=TOLERANCE, atol=TOLERANCE
        )
        y: Tensor = solution[-1]
        return y

    with torch.no_grad():
        with tdh.record() as recorded:
            y = solve()
        start = time.perf_counter()
        solve()
        ms = 1e3 * (time.perf_counter() - start)
        right = model.decode(y).argmax(1) == digits.test_labels
    solved = recorded.solves[-1]
    nfe = float(solved.nfe) if dise is None else float(solved.sample_nfe.double().mean())
    return Result(float(right.double().mean()), nfe, ms)


def fit_selector(model: Classifier, digits: Digits, seed: int) -> tdh.Dise:
    """Return a fitted selector; labels come from the training images."""
    cost = tdh.ClassificationCost(model.decode, digits.train_labels, alpha=1.0, penalty=2000.0)
    config = tdh.SelectorConfig(seed=seed)
    with torch.no_grad():
        y0 = model.encode(digits.train_images)
    return tdh.Dise(CANDIDATES).fit(model.field, y0, T, cost=cost, config=config)


def row(name: str, results: list[Result]) -> str:
    """Return a line of the table: means over seeds, standard deviations behind them."""
    cells = []
    for field, scale, digits in (("accuracy", 100, 2), ("nfe", 1, 2), ("ms", 1, 0)):
        values = [scale * getattr(result, field) for result in results]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        cells.append(f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}")
    return f"| {name} | {' | '.join(cells)} |"


def draw(images: Tensor, selection: Tensor, path: Path) -> None:
    """Draw which digits go to which integrator."""
    from matplotlib.figure import Figure

    columns = 12
    figure = Figure(figsize=(columns * 0.7 + 2, len(NAMES) * 0.9))
    axes = figure.subplots(len(NAMES), columns, squeeze=False)
    for index, (name, line) in enumerate(zip(NAMES, axes, strict=True)):
        chosen = images[selection == index]
        for axis, image in zip(line, chosen[:columns], strict=False):
            axis.imshow(image[0].numpy(), cmap="gray_r")
        for axis in line:
            axis.set_axis_off()
        share = f"{name}\n{len(chosen) / len(images):.0%}"
        line[0].text(-0.3, 0.5, share, transform=line[0].transAxes, ha="right", va="center")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, little training")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    # The tensors are small: more threads gain little, and lose much on a busy machine.
    torch.set_num_threads(1)
    digits = load_digits()
    epochs, seeds = (1, (0,)) if arguments.quick else (20, (0, 1, 2))

    names = (
        "dopri5",
        "dopri5, error-regularised",
        f"{NAMES[0]}, error-regularised",
        "DISE, error-regularised",
    )
    results: dict[str, list[Result]] = {name: [] for name in names}
    for seed in seeds:
        plain = train(digits, epochs, seed)
        model = train(digits, epochs, seed, error_weight=ERROR_WEIGHT)
        dise = fit_selector(model, digits, seed)
        euler = tdh.Dise(CANDIDATES[:1], lambda y0: torch.zeros(len(y0), 1))
        solved = (
            measure(plain, digits),
            measure(model, digits),
            measure(model, digits, euler),
            measure(model, digits, dise),
        )
        for name, result in zip(names, solved, strict=True):
            results[name].append(result)

    lines = ["| model | accuracy, % | mean NFE an image | ms |", "|---|--:|--:|--:|"]
    lines += [row(name, values) for name, values in results.items()]
    selection = dise.select(model.encode(digits.test_images))
    shares = (selection.bincount(minlength=len(NAMES)) / len(selection)).tolist()
    lines += [
        "",
        "Shares selected (last seed): "
        + ", ".join(f"{name} {share:.0%}" for name, share in zip(NAMES, shares, strict=True)),
    ]
    lines.append(
        f"{len(selection)} test images, dopri5 at 1e-3, mean ± standard deviation of "
        f"{len(seeds)} seeds; {tdh.evaluation.describe_machine(torch.device('cpu'))}."
    )
    text = "\n".join(lines)
    print(f"\n{text}\n")
    (arguments.out / "dise.md").write_text(text + "\n")
    draw(digits.test_images, selection, arguments.out / "dise.png")
    print(f"written to {arguments.out}: dise.md, dise.png")


if __name__ == "__main__":
    main()
