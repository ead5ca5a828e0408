"""Seconds of a call on the device, by its own clock, with the caches as a model leaves them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
_ROUNDS = 7


def copies(n_bytes: int, emulate: bool) -> int:
    """Of a weight, so that they pass every cache: each call of a round reads another one."""
    return 1 if emulate else max(1, min(64, (256 << 20) // max(n_bytes, 1)))


def seconds(calls: Sequence[Call], device: torch.device) -> float:
    """The median over rounds of the time of all of them, divided by how many they are.

    On a GPU they are captured in one graph: what is timed is kernels, not Python. One that cannot
    be captured raises.
    """
    if device.type == "cpu":
        begin = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - begin) / len(calls)
    from qlora_native.graph_timer import graph_seconds

    return statistics.median(graph_seconds(calls, _ROUNDS)) / len(calls)
