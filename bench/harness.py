"""Times contenders side by side, in one process, in shuffled rounds.

A bench file, bench_<op>.py, has TITLE and cases():

    def cases(quick: bool) -> Iterator[Case]:            # quick: tiny shapes, for the smoke test

`python -m bench.bench_<op>` prints its table; `python -m bench.report` runs them all; under
`pytest bench` the same cases are pytest-benchmark's, and bench.compare runs ours at two commits.
"""

from __future__ import annotations

import argparse
import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

import qlora_native
from bench.case import COMPILED, OURS, Call, Case, Tier, is_ours
from bench.limit_model import least_seconds, working_sets
from bench.limits import TRIES, Limits, measure, probe

Samples = dict[str, list[float]]  # contender -> seconds a call, round by round


@dataclass(frozen=True)
class Budget:
    """How long a case may take.

    At least `rounds`, and more until `seconds` are over or every contender has settled: its median
    is no more than `settled` above its best. Three are enough once `patience` is over. A peer is
    timed once if its call takes more than `hopeless` seconds, or a quarter of that and ten times as
    long as ours (bitsandbytes quantizes a hundred times more slowly; torch's fp16 product of a
    matrix takes as many times as long as its fp32 one where the processor lacks the instructions).
    """

    rounds: int = 7
    seconds: float = 1.5
    max_rounds: int = 60
    seconds_per_sample: float = 0.01  # short calls are repeated for so long
    settled: float = 0.02
    patience: float = 5.0
    hopeless: float = 1.5
    limit_tries: int = TRIES

    def once_is_enough(self, peer: float, ours: float) -> bool:
        """By the seconds of a call."""
        return peer > (self.hopeless if peer < 10 * ours else self.hopeless / 4)

    def goes_on(self, rounds: int, seconds: float, spread: float = math.inf) -> bool:
        if rounds < min(3, self.rounds):
            return True
        if rounds < self.rounds:
            return seconds < self.patience
        return rounds < self.max_rounds and seconds < self.seconds and spread > self.settled


SMOKE = Budget(rounds=1, seconds=0.0, max_rounds=1, seconds_per_sample=0.0, limit_tries=1)


@dataclass
class Row:
    """Seconds a call of every contender, round by round; ours under one instruction set."""

    case: Case
    isa: str
    limits: Limits
    limits_then: Limits  # with what the probes before and after the case saw
    samples: Samples = field(default_factory=dict)

    def median(self, name: str = OURS) -> float:
        return statistics.median(self.samples[name])

    def best(self, name: str = OURS) -> float:
        return min(self.samples[name])

    def limit(self) -> float:
        """The least seconds, by the limits as they are known now."""
        return least_seconds(self.case, self.limits, self.isa)

    def of_limit(self) -> float:
        """limit / our best time: both are the best of several."""
        return self.limit() / self.best()

    def of_limit_then(self) -> float:
        """As of_limit, of what the machine gave at the time."""
        return least_seconds(self.case, self.limits_then, self.isa) / self.best()

    def speedup(self, peer: str) -> float:
        """How many times faster than the peer we are: the median over rounds of the ratio."""
        return median_ratio(self.samples[peer], self.samples[OURS])

    @property
    def peers(self) -> list[str]:
        return [name for name in self.samples if name != OURS]


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median over rounds of above / below; where one was timed but once, of the medians."""
    if len(above) != len(below):
        return statistics.median(above) / statistics.median(below)
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def calls_per_sample(call: Call, seconds: float) -> int:
    return _calls(sample(call, 1), seconds)


def _calls(once: float, seconds: float) -> int:
    return max(1, min(1000, int(seconds / max(once, 1e-7))))


def sample(call: Call, calls: int) -> float:
    """Seconds a call, over so many."""
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def _spread(samples: Samples) -> float:
    """The largest of the contenders' median / best - 1, of those timed more than once."""
    return max(
        (statistics.median(s) / min(s) - 1 for s in samples.values() if len(s) > 1),
        default=math.inf,
    )


def time_contenders(
    contenders: dict[str, Call],
    budget: Budget,
    prepare: Callable[[str], object] = lambda name: None,
    seed: int = 0,
) -> Samples:
    """Seconds a call, by contender and round; each round runs them all in an order of its own.

    `prepare` is called with a contender's name before each of its samples.
    """
    shuffle = random.Random(seed)
    calls = {}
    samples: Samples = {}
    ours = math.inf
    for name in sorted(contenders, key=is_ours, reverse=True):
        call = contenders[name]
        prepare(name)
        once = sample(call, 1)  # it pays for page faults, tables and compilation
        if once < budget.hopeless or is_ours(name) or name.endswith(COMPILED):
            once = sample(call, 1)
        samples[name] = []
        if is_ours(name):
            ours = min(ours, once)
        elif budget.once_is_enough(once, ours):
            samples[name].append(once)
            continue
        calls[name] = _calls(once, budget.seconds_per_sample)
    order = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    try:
        begin = time.perf_counter()
        rounds = 0
        while budget.goes_on(rounds, time.perf_counter() - begin, _spread(samples)):
            shuffle.shuffle(order)
            for name in order:
                prepare(name)
                samples[name].append(sample(contenders[name], calls[name]))
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return samples


def _variant(name: str, isa: str) -> str:
    return f"{name} [{isa}]"


def _time_case(case: Case, budget: Budget, isas: Sequence[str]) -> Iterator[tuple[str, Samples]]:
    """Samples by contender, for each instruction set; the peers are timed once, among all ours."""
    calls = {name: make() for name, make in case.contenders.items()}
    ours = [name for name in calls if is_ours(name)]
    isa_of = {_variant(name, isa): isa for name in ours for isa in isas}
    contenders = {name: call for name, call in calls.items() if name not in ours}
    contenders |= {_variant(name, isa): calls[name] for name in ours for isa in isas}
    before = qlora_native.cpu_isa()
    try:
        samples = time_contenders(
            contenders, budget, lambda name: qlora_native.force_isa(isa_of.get(name, before))
        )
    finally:
        qlora_native.force_isa(before)
    for isa in isas:
        yield isa, {n: samples[_variant(n, isa) if n in ours else n] for n in calls}


def run(cases: Iterable[Case], budget: Budget, isas: Sequence[str]) -> Iterator[Row]:
    """Time every case, ours under each of the instruction sets."""
    limits = measure(torch.get_num_threads(), budget.limit_tries)
    for case in cases:
        print(f"  {case.name}", file=sys.stderr, flush=True)
        sizes = [] if budget is SMOKE else working_sets(case, limits, isas)
        before = probe(limits, sizes)
        timed = list(_time_case(case, budget, isas))
        then = limits.as_seen_by(before, probe(limits, sizes))
        for isa, samples in timed:
            yield Row(case, isa, limits, then, samples)


def main(title: str, cases: Callable[[bool], Iterable[Case]]) -> None:
    """The command line of one bench file."""
    from bench.tables import markdown_table

    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one round")
    parser.add_argument("--full", action="store_true", help="the cases too that the report omits")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", action="append", help="ours under this ISA (may be repeated)")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tier = Tier.FULL if args.full else Tier.REPORT
    chosen = (c for c in cases(args.quick) if args.only in c.name and c.tier <= tier)
    budget = SMOKE if args.quick else Budget()
    print(markdown_table(list(run(chosen, budget, args.isa or [qlora_native.cpu_isa()]))))
