"""Measure solvers against each other: calls, MACs, milliseconds and errors, in one run."""

from torchdiffeq_hyper.evaluation._evaluate import evaluate
from torchdiffeq_hyper.evaluation._measure import describe_machine
from torchdiffeq_hyper.evaluation._table import EvaluationRow, EvaluationTable

__all__ = ["EvaluationRow", "EvaluationTable", "describe_machine", "evaluate"]
