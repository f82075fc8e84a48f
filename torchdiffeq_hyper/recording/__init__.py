"""Records of solves: calls of func, time, and the steps' own error estimates."""

from torchdiffeq_hyper.recording._recorder import (
    Draft,
    Recorder,
    add,
    assigned,
    handed_over,
    no_steps,
    open_recorders,
    opened,
    paused,
    running,
    take_over,
)
from torchdiffeq_hyper.recording._solve import (
    AdjointGradientError,
    FreedGraphError,
    GraphCheck,
    MaxStepsError,
    NothingRecordedError,
    Partial,
    SampledStep,
    Solve,
    Steps,
    mark,
)
from torchdiffeq_hyper.recording._timing import FlopCounter, median_seconds

__all__ = [
    "AdjointGradientError",
    "Draft",
    "FlopCounter",
    "FreedGraphError",
    "GraphCheck",
    "MaxStepsError",
    "NothingRecordedError",
    "Partial",
    "Recorder",
    "SampledStep",
    "Solve",
    "Steps",
    "add",
    "assigned",
    "handed_over",
    "mark",
    "median_seconds",
    "no_steps",
    "open_recorders",
    "opened",
    "paused",
    "running",
    "take_over",
]
