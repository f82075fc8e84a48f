"""Learned solvers side by side with everybody else's, on the clock.

Five models: a CIFAR-10 and a digits classifier, a continuous normalizing flow, flow
matching, Van der Pol. On each: torchdiffeq's solvers, torchdyn's and torchode's where these
are installed, and ours, fitted on some starts and measured on others, all in turn. Prints
errors against cost, then the ratios at equal time and at equal accuracy. What was trained
and fitted is kept in the folder: a second run, or one after an interruption, only measures.

    python examples/benchmarks/side_by_side.py --data DIR [--only cifar,cnf] [--out DIR]

Writes side_by_side.md, side_by_side.csv and side_by_side.png to the folder out/, and each
model's own table and weights to a folder in it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torchdiffeq import odeint

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import _cifar, _cnf, _digits_model, _flow_matching, _picture, _report, _van_der_pol
from benchmarks._contestants import classical, learned, other_libraries, torchdyn_hypereuler
from benchmarks._fitted import fitted, of_state_and_time, recipes, two_calls
from benchmarks._measure import measure
from benchmarks._problem import Benchmark
from benchmarks._samples import compare

import torchdiffeq_hyper as tdh
from torchdiffeq_hyper.evaluation import EvaluationRow

MODELS = ("cifar", "digits", "cnf", "flow-matching", "van-der-pol")
QUICK = ("cnf", "van-der-pol")


def build(name: str, folder: Path, data: Path, quick: bool) -> Benchmark:
    """Return a model's benchmark, trained unless its weights are in the folder."""
    builders: dict[str, Callable[[], Benchmark]] = {
        "cifar": partial(_cifar.cifar, data, folder),
        "digits": partial(_digits_model.digits, folder),
        "cnf": partial(_cnf.cnf, folder, quick),
        "flow-matching": partial(_flow_matching.flow_matching, folder),
        "van-der-pol": partial(_van_der_pol.van_der_pol, quick),
    }
    return builders[name]()


def run(benchmark: Benchmark, folder: Path, quick: bool) -> None:
    """Fit what is not fitted yet, measure, and write the model's table."""
    solvers = [fitted(benchmark, recipe, folder) for recipe in recipes(quick)]
    of_state_and_time_only = fitted(benchmark, of_state_and_time(benchmark), folder)
    contestants = [
        *classical(quick),
        *other_libraries(quick),
        *learned(solvers),
        *torchdyn_hypereuler(of_state_and_time_only),
    ]
    table = measure(benchmark, contestants, repeats=1 if quick else benchmark.repeats)
    text = [f"## {benchmark.title}", table.to_markdown(), _report.derived(table.rows)]
    if benchmark.name == "cnf":
        text.append(sample(benchmark, folder, quick))
    (folder / "table.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    rows = [asdict(row) for row in table.rows]
    (folder / "rows.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def sample(benchmark: Benchmark, folder: Path, quick: bool) -> str:
    """Compare samples made with two calls of the field to dopri5's."""
    t = torch.tensor(benchmark.span)

    def exact(noise: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = odeint(benchmark.func, noise, t, rtol=1e-5, atol=1e-5)
        return y[-1]

    samplers = {}
    patient = replace(benchmark, fit_seconds=2 * benchmark.fit_seconds)
    for recipe in two_calls(quick):
        solver = fitted(patient, recipe, folder)
        samplers[recipe.name] = partial(_end, solver, benchmark, t)
    pairs, samples = (3, 200) if quick else (100, 5000)
    return _report.sampling(compare(samplers, exact, 2, pairs, samples), pairs, samples)


def _end(
    solver: tdh.Solver, benchmark: Benchmark, t: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    y = solver.solve(benchmark.func, noise, t)
    assert isinstance(y, torch.Tensor)
    return y[-1]


def assemble(out: Path) -> None:
    """Put the tables of all models in the folder together."""
    done = [name for name in MODELS if (out / name / "rows.json").is_file()]
    rows = {}
    for name in done:
        saved = json.loads((out / name / "rows.json").read_text(encoding="utf-8"))
        rows[name] = [EvaluationRow(**row) for row in saved]
    tables = [
        _report.summary(rows),
        *((out / name / "table.md").read_text(encoding="utf-8") for name in done),
    ]
    (out / "side_by_side.md").write_text("\n\n".join(tables), encoding="utf-8")
    _report.write_csv(rows, out / "side_by_side.csv")
    _picture.draw(rows, out / "side_by_side.png")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder that holds cifar-10-batches-bin")
    parser.add_argument("--only", default="", help="models, with commas between")
    parser.add_argument(
        "--quick", action="store_true", help="seconds: small models, little fitting"
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the results")
    parser.add_argument(
        "--fit-time", type=float, default=1.0, metavar="X", help="X times as long for each fit"
    )
    given = parser.parse_args(arguments)
    models = QUICK if given.quick else MODELS
    names = [name for name in given.only.split(",") if name] or list(models)
    unknown = sorted(set(names) - set(models))
    if unknown:
        parser.error(f"no model is called {', '.join(unknown)}; there are {', '.join(models)}")
    if "cifar" in names and given.data is None:
        parser.error("the CIFAR-10 model needs --data; --only leaves it out")
    threads = torch.get_num_threads()
    for name in names:
        folder = given.out / name
        folder.mkdir(parents=True, exist_ok=True)
        # The others' tensors are small: more threads gain little, and make times waver.
        torch.set_num_threads(threads if name == "cifar" else 1)
        benchmark = build(name, folder, given.data, given.quick)
        seconds = 1.0 if given.quick else benchmark.fit_seconds * given.fit_time
        run(replace(benchmark, fit_seconds=seconds), folder, given.quick)
        print(f"\n{(folder / 'table.md').read_text(encoding='utf-8')}", flush=True)
        assemble(given.out)
    print(f"written to {given.out}: side_by_side.md, side_by_side.csv, side_by_side.png")


if __name__ == "__main__":
    main()
