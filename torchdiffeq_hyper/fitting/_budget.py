"""The time a fit may take: how many reference solutions and iterations end in it.

Why a phase of a fit ends is in `_phases`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from torchdiffeq_hyper._state import VectorField, wide_dtype
from torchdiffeq_hyper.errors import HyperError
from torchdiffeq_hyper.fitting._batches import Starts, head, n_samples
from torchdiffeq_hyper.fitting._data import References
from torchdiffeq_hyper.fitting._field import Field, OutOfTimeError
from torchdiffeq_hyper.fitting._reference import Tolerances, solve_reference

FIRST_PHASE = 0.4  # share of the time left that a phase followed by another may take
LAST_PHASE = 0.97  # share that the last phase may take; the rest is for measuring the result
MOST_RESERVED = 0.25  # share of the time left that may be kept for measuring the result
REFERENCES = 0.3  # share of all time that new reference solutions may take
EARLIEST = 4  # timed iterations before the first estimate


class Budget:
    """Wall time, counted on over interruptions, on a clock that all processes may share."""

    def __init__(self, max_seconds: float, shared_clock: Callable[[], float] | None = None) -> None:
        self.max_seconds = max_seconds
        self.reserved = 0.0  # seconds wanted for measuring the result
        self._clock = time.perf_counter if shared_clock is None else shared_clock
        self._began = self._clock()
        self._own_began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Wall time used, the same in all processes."""
        return self._clock() - self._began

    @property
    def elapsed(self) -> float:
        """Wall time used, on this process's own clock."""
        # A shared one stands still between exchanges, as within a reference solution.
        return time.perf_counter() - self._own_began

    def is_over(self) -> bool:
        """Return whether all the time is used."""
        return self.elapsed >= self.max_seconds

    def until(self, elapsed: float) -> Budget:
        """Return the same clock with an earlier end."""
        earlier = copy.copy(self)
        earlier.max_seconds = min(elapsed, self.max_seconds)
        return earlier

    def resume(self, used: float) -> None:
        """Count the time an interrupted run had used as well."""
        self._began -= used
        self._own_began -= used

    def affordable_batches(self, seconds_per_batch: float, spent: float = 0.0) -> int:
        """Return how many batches may be given reference solutions, at least one."""
        left = REFERENCES * self.max_seconds - spent
        return max(1, int(left / max(seconds_per_batch, 1e-6)))

    def start_phase(self, wanted: int, share: float) -> Pace:
        """Return the pace of a phase that begins now and takes a share of the time left."""
        now = self.seconds
        left = max(0.0, self.max_seconds - now)
        return Pace(self, now + share * (left - min(self.reserved, MOST_RESERVED * left)), wanted)


@dataclass
class Pace:
    """How many of the wanted iterations of a phase end before its deadline.

    Estimated ever more rarely, so that the learning rate is annealed to the end whatever the
    machine's speed; a fit whose iterations all end in time is repeatable.
    """

    _budget: Budget
    deadline: float
    _wanted: int
    _timed: int = -1
    _first: float = 0.0

    def is_over(self) -> bool:
        """Return whether the phase's time is up."""
        return self._budget.seconds >= self.deadline

    def plan(self, done: int, planned: int) -> int:
        """Return the iterations to plan for, after each one that was done."""
        self._timed += 1
        now = self._budget.seconds
        if self._timed == 0:  # the first one pays for what is set up once
            self._first = now
        if self._timed < EARLIEST or self._timed & (self._timed - 1):
            return planned
        each = (now - self._first) / self._timed
        return min(self._wanted, done + int(max(0.0, self.deadline - now) / max(each, 1e-9)))


ENDLESS = Budget(math.inf)

PROBES = 8  # samples that calls are timed, and the noise is measured, on
FEWEST = 16  # samples that are kept before digits are given up
PLENTY = 4000  # calls of func for all references: where so many end in time, nothing is cut
FREE = 1.2  # cost of a call relative to that of one without samples, up to which samples are free
LOOSEST = 1e-3  # relative tolerance of the probe, beyond which nothing is loosened
PROBE_SHARE = 0.1  # share of all time that the probe may take
HELD_OUT_SHARE = 0.35  # share of that time for the held-out samples; the rest is for a batch
NOISE_SOLVES = 2.6  # solutions of the probes, in calls of one, that the noise is measured with
ORDERS = {"dopri8": 8, "bosh3": 3, "fehlberg2": 2, "adaptive_heun": 2}  # where not 5


@dataclass(frozen=True)
class ReferencePlan:
    """What is solved, and how exactly."""

    tolerances: Tolerances
    held_out: int  # samples to keep of the held-out ones
    batch: int  # and of each training batch
    has_noise: bool = True  # whether there is time to measure the noise in the solutions
    is_looser: bool = False  # whether the tolerances are looser than wanted
    note: str = ""  # what was cut, for people

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ReferencePlan:
        """Rebuild from what `dataclasses.asdict` returned."""
        return cls(**{**data, "tolerances": Tolerances(**data["tolerances"])})

    def hurried(self) -> ReferencePlan:
        """Return the plan for where the first solutions took too long."""
        rtol, few = max(LOOSEST, self.tolerances.rtol), FEWEST // 2
        counts = min(self.held_out, few), min(self.batch, few)
        note = f"the first solutions took too long: a tolerance of {rtol:.0e} and few samples"
        looser = self.tolerances.loosened(rtol)
        return ReferencePlan(looser, *counts, has_noise=False, is_looser=True, note=note)


@dataclass(frozen=True)
class CallCost:
    """Seconds of one call of func: a part for every call and one for every sample."""

    each: float
    per_sample: float

    @classmethod
    def measure(cls, func: VectorField, starts: Starts, span: tuple[float, float]) -> CallCost:
        """Time a call on all samples, and one on a few of them."""
        count = n_samples(starts)
        few = min(PROBES, count)
        short, long = (_seconds(func, head(starts, n), span) for n in (few, count))
        if count == few:
            return cls(short, 0.0)
        per_sample = max(0.0, (long - short) / (count - few))
        return cls(max(0.0, short - few * per_sample), per_sample)

    def of(self, samples: int) -> float:
        """Return the seconds of a call on some samples."""
        return self.each + samples * self.per_sample

    def samples_in(self, seconds: float, most: int) -> int:
        """Return how many samples a call of so many seconds has, at most ``most``."""
        seconds = max(seconds, FREE * self.each)  # fewer than these save nothing
        if self.of(most) <= seconds:
            return most
        return max(0, min(most, int((seconds - self.each) / max(self.per_sample, 1e-12))))


@torch.no_grad()
def _seconds(func: VectorField, starts: Starts, span: tuple[float, float]) -> float:
    """Return the wall time of one call, the shorter of two."""
    field = Field(func, starts, ENDLESS)
    y = field.flat.to(wide_dtype(field.flat.device))
    t, times = y.new_tensor(span[0]), []
    for _ in range(2):
        began = time.perf_counter()
        float(field(t, y).sum())  # waits for the device
        times.append(time.perf_counter() - began)
    return min(times)


def plan_references(
    references: References, held_out: Starts, in_batch: int, budget: Budget
) -> ReferencePlan:
    """Return what can be solved in the time that references may take.

    Where that is short, a loose solution of a few samples is timed; first the number of samples
    is cut, of which a training batch has ``in_batch``, then the tolerances.
    """
    wanted, times, count = references.tolerances, references.plan.times, n_samples(held_out)
    cost = CallCost.measure(references.func, held_out, (float(times[0]), float(times[-1])))
    allowed = REFERENCES * budget.max_seconds - budget.elapsed
    if PLENTY * cost.of(max(count, in_batch)) <= allowed:
        return ReferencePlan(wanted, count, in_batch)
    loose = max(LOOSEST, wanted.rtol)
    calls = _calls(references, held_out, wanted.loosened(loose), budget)
    allowed = max(0.0, REFERENCES * budget.max_seconds - budget.elapsed)
    rtol = wanted.rtol
    while True:
        needed = calls * (loose / rtol) ** (1 / ORDERS.get(wanted.method, 5))
        noise = NOISE_SOLVES * needed * cost.of(min(PROBES, count))
        least = needed * (cost.of(min(FEWEST, count)) + cost.of(min(FEWEST, in_batch)))
        has_noise = noise + least <= allowed
        if has_noise or rtol >= loose:
            break
        rtol = min(loose, 10 * rtol)
    each = (allowed - noise * has_noise) / max(needed, 1)
    kept = max(min(2, count), cost.samples_in(HELD_OUT_SHARE * each, count))
    trained = max(min(2, in_batch), cost.samples_in((1 - HELD_OUT_SHARE) * each, in_batch))
    is_looser = rtol > wanted.rtol
    cuts = {
        f"a tolerance of {rtol:.0e} in place of {wanted.rtol:.0e}": is_looser,
        f"{kept} of {count} held-out samples": kept < count,
        f"{trained} of {in_batch} samples in a batch": trained < in_batch,
        "the noise in them not measured": not has_noise,
    }
    cut = ", ".join(text for text, is_made in cuts.items() if is_made)
    note = f"reference solutions were cut to fit into max_seconds = {budget.max_seconds:g}: {cut}"
    tolerances = wanted.loosened(rtol)
    return ReferencePlan(tolerances, kept, trained, has_noise, is_looser, note if cut else "")


def _calls(references: References, starts: Starts, loose: Tolerances, budget: Budget) -> int:
    """Return the calls of a loose solution of a few samples, as far as it came."""
    until = budget.until(budget.elapsed + PROBE_SHARE * budget.max_seconds)
    field = Field(references.func, head(starts, PROBES), until, references.units)
    with suppress(HyperError):  # it is reported where the solution is needed
        try:
            solve_reference(field, field.flat, references.plan.times, loose)
        except OutOfTimeError:
            return 2 * field.calls
    return field.calls
