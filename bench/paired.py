"""What pairs of timings say about B against A: the ratio, and how sure it is.

Each pair was measured side by side, so a drift of the machine is in both of its halves. The ratio
is the geometric mean over pairs of B's time over A's, and its interval is bootstrapped: pairs are
drawn with replacement, many times, and the middle 95 % of the means are kept. Pairs must be
independent: timings of one process are not, and count as one.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

RESAMPLES = 4000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """B's time over A's, with its interval: above 1, B is slower."""

    value: float
    low: float
    high: float

    def slower(self, threshold: float) -> bool:
        """By more than the threshold, and not by chance: the interval is all above 1."""
        return self.value > 1 + threshold and self.low > 1

    def faster(self, threshold: float) -> bool:
        return self.value < 1 / (1 + threshold) and self.high < 1


def ratio(pairs: Sequence[tuple[float, float]], seed: int = 0) -> Ratio:
    """Of pairs (A's seconds, B's seconds).

    Raises:
        ValueError: there are fewer than three.
    """
    if len(pairs) < 3:
        raise ValueError(f"an interval needs at least 3 pairs, got {len(pairs)}")
    logs = [math.log(b / a) for a, b in pairs]
    draw = random.Random(seed)
    means = sorted(statistics.fmean(draw.choices(logs, k=len(logs))) for _ in range(RESAMPLES))
    tail = round((1 - CONFIDENCE) / 2 * RESAMPLES)
    return Ratio(
        value=math.exp(statistics.fmean(logs)),
        low=math.exp(means[tail]),
        high=math.exp(means[-1 - tail]),
    )
