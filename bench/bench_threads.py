"""Ours on one thread and on all of them, in alternating samples, and what the limits would allow.

Work that the multiply-add rate limits should take half the time on two threads; what memory limits
gains as much as the memory's bandwidth does.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch

from bench.case import OURS, Case, Tier
from bench.harness import SMOKE, Budget, Samples, median_ratio, time_contenders
from bench.limit_model import least_seconds
from bench.limits import measure
from bench.section import Section, all_cases
from bench.tables import seconds
from qlora_native import cpu_isa

TITLE = "Threads"
_BUDGET = Budget(seconds=2.0, hopeless=math.inf)


def _time(case: Case, threads: int, budget: Budget) -> Samples:
    """Samples by number of threads, "1" and the other."""
    call = case.contenders[OURS]()
    contenders = {str(n): call for n in (1, threads)}
    try:
        return time_contenders(contenders, budget, lambda n: torch.set_num_threads(int(n)))
    finally:
        torch.set_num_threads(threads)


def section(quick: bool) -> Section:
    threads = torch.get_num_threads()
    if threads == 1:
        return Section(TITLE, "There is one thread.", [])
    budget = SMOKE if quick else _BUDGET
    limits = {n: measure(n, budget.limit_tries) for n in (1, threads)}
    lines = [
        f"Ours with {cpu_isa()}. *Limits* is the ratio of the machine's limits on 1 and on "
        f"{threads} threads: what work would gain that runs at its limit.",
        "",
        f"| case | 1 thread | {threads} threads | faster | limits |",
        "|---|---:|---:|---:|---:|",
    ]
    data: list[dict[str, Any]] = []
    for _, case in all_cases(Tier.CORE, quick):
        samples = _time(case, threads, budget)
        one, many = min(samples["1"]), min(samples[str(threads)])
        faster = median_ratio(samples["1"], samples[str(threads)])
        least = {n: least_seconds(case, limits[n], cpu_isa()) for n in limits}
        limits_ratio = least[1] / least[threads]
        lines.append(
            f"| {case.name} | {seconds(one)} | {seconds(many)} | {faster:.2f}× "
            f"| {limits_ratio:.2f}× |"
        )
        data.append(
            {
                "case": case.name,
                "threads": threads,
                "best_seconds": {"1": one, str(threads): many},
                "faster": faster,
                "limits_ratio": limits_ratio,
            }
        )
    return Section(TITLE, "\n".join(lines), data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one round")
    args = parser.parse_args()
    print(section(args.quick).markdown)
