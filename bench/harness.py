"""Times contenders side by side, in one process, in shuffled rounds.

A bench file, bench_<op>.py, has TITLE and cases():

    def cases(quick: bool) -> Iterator[Case]:            # quick: tiny shapes, for the smoke test
        yield Case("Llama-3-8B q_proj, fp32", contenders, read=..., write=..., flops=...)

where `contenders` makes the data when its turn comes and returns {name: function of no arguments},
ours under the name OURS. peers.py has the peers that may be missing. `python -m bench.bench_<op>`
prints its table; `python -m bench.report` runs them all; `pytest bench` runs the same cases under
pytest-benchmark.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

import qlora_native
from bench.limits import Limits, measure, measure_again

OURS = "qlora_native"
Contenders = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """One row: what is done to which shape, and the least that any way of doing it costs."""

    name: str
    contenders: Callable[[], Contenders]
    read: int = 0  # bytes that must be read
    write: int = 0  # bytes that must be written
    flops: int = 0
    bf16: bool = False  # the products are of bf16 pairs, where the processor has such instructions

    def limit_seconds(self, limits: Limits, isa: str) -> float:
        """The larger of bytes over bandwidth and FLOPs over the instruction set's rate."""
        bytes_moved = self.read + self.write
        flops_isa = "avx512" if isa == "avx512bf16" and not self.bf16 else isa
        return max(
            bytes_moved / limits.best_bandwidth(bytes_moved),
            self.flops / limits.flops[flops_isa],
        )


@dataclass(frozen=True)
class Budget:
    """How long a case may take: at least `rounds`, and more until `seconds` are over."""

    rounds: int = 7
    seconds: float = 4.0
    max_rounds: int = 60
    seconds_per_sample: float = 0.01  # short calls are repeated for so long


SMOKE = Budget(rounds=1, seconds=0.0, max_rounds=1, seconds_per_sample=0.0)


@dataclass
class Row:
    """Seconds a call of every contender, round by round."""

    case: Case
    isa: str  # ours ran under this one
    limits: Limits
    samples: dict[str, list[float]] = field(default_factory=dict)

    def median(self, name: str = OURS) -> float:
        return statistics.median(self.samples[name])

    def best(self, name: str = OURS) -> float:
        return min(self.samples[name])

    def limit(self) -> float:
        """The least seconds, by the limits as they are known now."""
        return self.case.limit_seconds(self.limits, self.isa)

    def of_limit(self) -> float:
        """limit / our best time: both are the best of several."""
        return self.limit() / self.best()

    def speedup(self, peer: str) -> float:
        """How many times faster than the peer we are: the median over rounds of the ratio."""
        pairs = zip(self.samples[peer], self.samples[OURS], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    @property
    def peers(self) -> list[str]:
        return [name for name in self.samples if name != OURS]


def _calls_per_sample(call: Callable[[], object], seconds: float) -> int:
    begin = time.perf_counter()
    call()
    once = time.perf_counter() - begin
    return max(1, min(1000, int(seconds / max(once, 1e-7))))


def _sample(call: Callable[[], object], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def time_contenders(
    contenders: Contenders, budget: Budget, seed: int = 0
) -> dict[str, list[float]]:
    """Seconds a call, by contender and round; each round runs them all in an order of its own."""
    shuffle = random.Random(seed)
    for call in contenders.values():  # the first call pays for page faults, tables and compilation
        call()
    calls = {n: _calls_per_sample(c, budget.seconds_per_sample) for n, c in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + budget.seconds
        rounds = 0
        while rounds < budget.rounds or (rounds < budget.max_rounds and time.perf_counter() < end):
            shuffle.shuffle(order)
            for name in order:
                samples[name].append(_sample(contenders[name], calls[name]))
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return samples


def run(cases: Iterable[Case], budget: Budget, isas: Iterable[str]) -> Iterator[Row]:
    """Time every case, ours under each of the instruction sets in turn."""
    before = qlora_native.cpu_isa()
    limits = measure(torch.get_num_threads())
    for case in cases:
        print(f"  {case.name}", file=sys.stderr, flush=True)
        contenders = case.contenders()
        for isa in isas:
            qlora_native.force_isa(isa)
            try:
                samples = time_contenders(contenders, budget)
            finally:
                qlora_native.force_isa(before)
            yield Row(case, isa, limits, samples)
    measure_again(limits.threads)


def main(title: str, cases: Callable[[bool], Iterable[Case]]) -> None:
    """The command line of one bench file."""
    from bench.tables import markdown_table

    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", action="append", help="ours under this ISA (may be repeated)")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    chosen = (case for case in cases(args.quick) if args.only in case.name)
    rows = list(
        run(chosen, SMOKE if args.quick else Budget(), args.isa or [qlora_native.cpu_isa()])
    )
    print(markdown_table(rows))
