"""Records of solves: calls of func, time, and the steps' own error estimates."""

from torchdiffeq_hyper._state import part_norms
from torchdiffeq_hyper.recording._recorder import (
    Draft,
    Recorder,
    add,
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
    Guard,
    MaxStepsError,
    NothingRecordedError,
    Partial,
    SampledStep,
    Solve,
    Steps,
    mark,
)

__all__ = [
    "AdjointGradientError",
    "Draft",
    "FreedGraphError",
    "Guard",
    "MaxStepsError",
    "NothingRecordedError",
    "Partial",
    "Recorder",
    "SampledStep",
    "Solve",
    "Steps",
    "add",
    "handed_over",
    "mark",
    "no_steps",
    "open_recorders",
    "opened",
    "part_norms",
    "paused",
    "running",
    "take_over",
]
