"""Start here: make a digit classifier's Neural ODE cheap, and measure what was gained.

Trains a convolutional Neural ODE on scikit-learn's real digits, fits bespoke solvers and
hypersolvers to it, prints a table of error against cost on test images, and draws it.

    python examples/a1_digits.py

Writes pareto.png, pareto.md, pareto.csv, bns-5.safetensors, bns-10.safetensors,
euler-10.safetensors and heun-5.safetensors to the folder out/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from _digits import load_digits, train

import torchdiffeq_hyper as tdh

FITS = (("bns", 5, 100), ("bns", 10, 100), ("euler", 10, 800), ("heun", 5, 800))
"""Base, steps and iterations of each fit."""


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute's worth, less accurate")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    # The tensors are small: more threads gain little, and lose much on a busy machine.
    torch.set_num_threads(1)
    digits = load_digits()
    model = train(digits, epochs=1 if arguments.quick else 20)
    with torch.no_grad():
        train_y0, test_y0 = model.encode(digits.train_images), model.encode(digits.test_images)
    if arguments.quick:
        train_y0 = train_y0[:160]

    solvers = []
    for base, steps, iterations in FITS:
        # By iterations: a slow machine takes longer, and finds the same.
        config = tdh.FitConfig(iterations=4 if arguments.quick else iterations, max_seconds=3600.0)
        solver = tdh.fit(model.field, train_y0, (0.0, 1.0), base=base, steps=steps, config=config)
        print(f"\n{base}, {steps} steps:\n{solver.report}\n")
        solver.save(arguments.out / f"{base}-{steps}.safetensors")
        solvers.append(solver)

    def accuracy(y: torch.Tensor) -> float:
        return float((model.decode(y).argmax(1) == digits.test_labels).float().mean())

    table = tdh.evaluate(
        model.field,
        test_y0,
        (0.0, 1.0),
        ["dopri5", "euler", "midpoint", "heun2", "rk4", *solvers],
        steps=(2, 5) if arguments.quick else (2, 4, 5, 10),
        tolerances=(1e-2, 1e-3, 1e-4),
        metric=accuracy,
        metric_name="accuracy",
        repeats=1 if arguments.quick else 3,
    )
    markdown = table.to_markdown()
    print(f"\n{markdown}\n")
    (arguments.out / "pareto.md").write_text(markdown + "\n")
    table.to_csv(arguments.out / "pareto.csv")
    table.plot(arguments.out / "pareto.png")
    print(f"written to {arguments.out}: the table, pareto.png and the solvers")


if __name__ == "__main__":
    main()
