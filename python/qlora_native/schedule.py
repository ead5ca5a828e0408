"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up to `peak` in `warmup` steps, then down to 0 at `steps` (or level).

    Step `warmup` is the first at the peak, and the first step's rate is above 0: (s + 1) / (w + 1).
    """

    kind: Literal["cosine", "linear", "constant"]
    peak: float
    steps: int
    warmup: int

    def __call__(self, step: int) -> float:
        """The rate of step 0, 1, …, steps - 1."""
        if step < self.warmup:
            return self.peak * (step + 1) / (self.warmup + 1)
        if self.kind == "constant":
            return self.peak
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        if self.kind == "linear":
            return self.peak * (1.0 - progress)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_steps(warmup: float, steps: int) -> int:
    """`warmup` is a fraction of the steps below 1, else a number of steps."""
    return min(round(warmup * steps) if warmup < 1 else round(warmup), steps)
