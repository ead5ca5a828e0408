"""Times work on a GPU by the card's own clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]


def graph_seconds(calls: Sequence[Call], rounds: int) -> list[float]:
    """Seconds of all the calls together, in each of some rounds, on the current CUDA device.

    They are captured in one graph: what is timed is kernels, not Python. One that cannot be
    captured raises.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(rounds):
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return times
