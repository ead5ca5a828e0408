"""The harness's cases, one contender and one number of threads each, under pytest-benchmark.

    pytest bench                                        # about a minute
    pytest bench -m linear -k 'M=1- and bfloat16'       # marker: benchmark; -k: words of the name
    pytest bench -m 'quantize and ours' --full          # every case, and peers that compile
    pytest bench --benchmark-group-by=param:case --benchmark-columns=median,min,rounds

An id tells op, shape, M, dtype, contender and threads, with dashes between its words:
"forward-4096-x-4096-M=1-bfloat16-qlora_native-2-threads".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.case import COMPILED, Case, Tier, is_ours
from bench.harness import Budget, calls_per_sample
from bench.section import all_cases

BUDGET = Budget(rounds=3, seconds=0.1, max_rounds=20, seconds_per_sample=0.005)


def _parameters() -> Iterator[object]:
    for benchmark, case in all_cases(Tier.FULL):
        for contender in case.contenders:
            for threads in dict.fromkeys((1, torch.get_num_threads())):
                marks = [getattr(pytest.mark, benchmark)]
                marks.append(pytest.mark.ours if is_ours(contender) else pytest.mark.peer)
                if case.tier > Tier.CORE or contender.endswith(COMPILED):
                    marks.append(pytest.mark.full)
                words = f"{case.name} {contender} {threads} threads"
                name = re.sub(r"[ ,()]+", "-", words.replace("×", "x"))
                yield pytest.param(case, contender, threads, marks=marks, id=name)


@pytest.mark.parametrize(("case", "contender", "threads"), list(_parameters()))
def test_case(benchmark: Any, case: Case, contender: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        call = case.contenders[contender]()
        call()  # page faults, tables and compilation
        calls = calls_per_sample(call, BUDGET.seconds_per_sample)
        samples = calls_per_sample(call, BUDGET.seconds) // calls
        rounds = max(BUDGET.rounds, min(BUDGET.max_rounds, samples))
        benchmark.pedantic(call, iterations=calls, rounds=rounds)
    finally:
        torch.set_num_threads(before)
    best = benchmark.stats.stats.min
    benchmark.extra_info["GB/s"] = (case.read + case.write) / best / 1e9
    if case.flops:
        benchmark.extra_info["GFLOP/s"] = case.flops / best / 1e9
