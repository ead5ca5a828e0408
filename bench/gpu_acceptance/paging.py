"""Stage: steps of paged optimizers beside the plain one, with all state on the GPU and with none.

With all state resident a step should cost what the plain one costs; with the state on the host it
should go at the rate of the link, which is measured here by plain copies both ways at once. Memory
is no part of that: a budget of nothing makes the pressure, never a state that the card cannot hold.
`--oversubscribe` adds that, for a machine of one's own: managed memory beyond what is free.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu_acceptance import setting as settings
from bench.gpu_acceptance.setting import Setting

PAGERS = ("managed", "staged")
MOST_RESIDENT = 1.02  # of the plain step's time
LEAST_OF_LINK = 0.85  # each way
_ROUNDS, _STEPS = 3, 5


def values(setting: Setting) -> int:
    """Of one parameter: 32-bit AdamW state of 512 MB, or of a thirty-second of what is free."""
    if setting.emulate:
        return 1 << 16
    free, _ = torch.cuda.mem_get_info()
    return min(1 << 26, free // 32 // 8 // 4096 * 4096)


def seconds_of(work: Callable[[], object], setting: Setting) -> float:
    if not setting.emulate:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if not setting.emulate:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def link(setting: Setting) -> float | None:
    """Bytes a second of copies between pinned and device memory, each way, both at once."""
    if setting.emulate:
        return None
    size = 256 << 20
    there = [torch.empty(size, dtype=torch.uint8, device=setting.device) for _ in range(2)]
    here = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]

    def both() -> None:
        with torch.cuda.stream(streams[0]):
            there[0].copy_(here[0], non_blocking=True)
        with torch.cuda.stream(streams[1]):
            here[1].copy_(there[1], non_blocking=True)

    both()
    return size / min(seconds_of(both, setting) for _ in range(5))


class Contender:
    """An optimizer of one parameter, that starts where the others do."""

    def __init__(self, make: Callable[..., Any], start: Tensor, grad: Tensor, **options: Any):
        self.param = nn.Parameter(start.clone())
        self.param.grad = grad
        self.optimizer = make([self.param], lr=1e-3, **options)

    def steps(self, n: int) -> None:
        for _ in range(n):
            self.optimizer.step()


def measure(setting: Setting, budget: str) -> dict[str, Any]:
    """Each pager beside the plain optimizer, in turns; equal bits in the end."""
    from qlora_native import _core
    from qlora_native.optim import AdamW, PagedAdamW

    n = values(setting)
    start, grad = (torch.randn(n, device=setting.device) for _ in range(2))
    options = {"chunk_bytes": 1 << 15, "min_paged_size": 0} if setting.emulate else {}
    lacking = {name: _core.why_no_pager(name) for name in PAGERS}
    contenders = {"plain": Contender(AdamW, start, grad)}
    for name in PAGERS:
        if lacking[name] is None:
            contenders[name] = Contender(
                PagedAdamW, start, grad, pager=name, device_budget=budget, **options
            )
    rounds, steps = (1, 1) if setting.emulate else (_ROUNDS, _STEPS)
    for contender in contenders.values():
        contender.steps(1)  # makes the state
    begin = {name: c.optimizer.paging() for name, c in contenders.items() if name != "plain"}
    times = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            times[name].append(seconds_of(lambda c=contender: c.steps(steps), setting) / steps)
    result: dict[str, Any] = {"bytes": 8 * n, "seconds": {k: min(t) for k, t in times.items()}}
    for name in PAGERS:
        if lacking[name] is not None:
            result[name] = {"lacks": lacking[name]}
            continue
        end = contenders[name].optimizer.paging()
        total = sum(times[name]) * steps
        result[name] = {
            "of_plain": result["seconds"][name] / result["seconds"]["plain"],
            "resident": end["resident"],
            "in_per_second": (end["moved_in"] - begin[name]["moved_in"]) / total,
            "out_per_second": (end["moved_out"] - begin[name]["moved_out"]) / total,
            "waited": (end["waited"] - begin[name]["waited"]) / total,
            "equal": torch.equal(contenders[name].param, contenders["plain"].param),
        }
    return result


def oversubscribed(setting: Setting) -> dict[str, Any]:
    """Managed memory of a quarter more than is free, gone through in chunks, twice."""
    from qlora_native import _core

    free, chunk = (
        (32 << 20, 1 << 20) if setting.emulate else (torch.cuda.mem_get_info()[0], 64 << 20)
    )
    if setting.emulate:
        from qlora_native import _emulation

        _emulation.set_device_bytes(free)
    chunks = -(-free * 5 // 4 // chunk)
    buffer = _core.PagedBuffer("managed", chunks * chunk, oversubscribe=True)

    def walk() -> None:
        stream = 0 if setting.emulate else torch.cuda.current_stream().cuda_stream
        for i in range(chunks):
            if i + 1 < chunks:
                buffer.prefetch((i + 1) * chunk, chunk, stream)
            taken = torch.from_dlpack(buffer.acquire(i * chunk, chunk, stream))
            if not setting.emulate:  # the emulator sees no kernel of torch's
                taken.add_(1)
            buffer.release(i * chunk, chunk, stream)
            buffer.evict(i * chunk, chunk, stream)

    took = seconds_of(lambda: (walk(), walk()), setting)
    stats = buffer.stats()
    host = torch.from_dlpack(buffer.host_view())
    right = setting.emulate or all(
        bool((host[i * chunk : (i + 1) * chunk] == 2).all()) for i in range(chunks)
    )
    return {
        "bytes": chunks * chunk, "free": free, "in_per_second": stats["moved_in"] / took,
        "out_per_second": stats["moved_out"] / took, "equal": right,
    }  # fmt: skip


def main() -> None:
    setting = settings.of_stage(__doc__)
    settings.serve_by_cuda(setting)
    torch.manual_seed(0)
    result: dict[str, Any] = {"link_bytes_per_second": link(setting)}
    for name, budget in (("resident", "1TB"), ("on the host", "0B")):
        result[name] = measure(setting, budget)
        settings.write_result(setting, "paging", result)
    if setting.oversubscribe:
        result["oversubscribed"] = oversubscribed(setting)
        settings.write_result(setting, "paging", result)
    rows = [
        row for case in result.values() if isinstance(case, dict) for row in (case, *case.values())
    ]
    unequal = [row for row in rows if isinstance(row, dict) and row.get("equal") is False]
    raise SystemExit(f"other bits than the plain optimizer: {unequal}" if unequal else 0)


if __name__ == "__main__":
    main()
