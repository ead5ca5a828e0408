"""Does the time of a FLOP stay the same as the weight grows? Ours, from 1024² to 8192 × 28672."""

from __future__ import annotations

import argparse
import gc
import sys
from typing import Any

import torch

from bench.case import OURS, dtype_name
from bench.data import matrix
from bench.harness import SMOKE, Budget, time_contenders
from bench.linear_contenders import forward
from bench.linear_layers import Problem
from bench.section import Section
from qlora_native import cpu_isa

TITLE = "Growth"
FLAT = 0.10  # what may lie between a shape's time per FLOP and the shape of reference's
_BUDGET = Budget(rounds=5, seconds=2.0)

# [out_features, in_features]; the first is the one that the others are held against.
_SHAPES = {
    "4096 × 4096": (4096, 4096),
    "1024 × 1024": (1024, 1024),
    "2048 × 2048": (2048, 2048),
    "14336 × 4096 (Llama-3-8B up_proj)": (14336, 4096),
    "4096 × 14336 (Llama-3-8B down_proj)": (4096, 14336),
    "8192 × 8192": (8192, 8192),
    "28672 × 8192 (Llama-3-70B up_proj)": (28672, 8192),
    "8192 × 28672 (Llama-3-70B down_proj)": (8192, 28672),
}
_TINY = {"48 × 64": (48, 64), "64 × 128": (64, 128)}


def _best_seconds(problem: Problem, budget: Budget) -> float:
    call = forward(problem, compiled=False)[OURS]()
    matrix.cache_clear()  # the float weight of the largest shape is a gigabyte
    gc.collect()
    return min(time_contenders({OURS: call}, budget)[OURS])


def section(quick: bool) -> Section:
    budget = SMOKE if quick else _BUDGET
    lines = [
        f"Forward, ours with {cpu_isa()}; picoseconds a FLOP, and in brackets to the first row's. "
        f"*Flat* is within ±{FLAT:.0%}; ▲ marks what takes longer.",
        "",
    ]
    columns = [(m, dtype) for dtype in (torch.float32, torch.bfloat16) for m in (1, 512)]
    data: list[dict[str, Any]] = []
    reference: dict[tuple[int, torch.dtype], float] = {}
    lines.append("| weight | " + " | ".join(f"M={m}, {dtype_name(d)}" for m, d in columns) + " |")
    lines.append("|---|" + "---:|" * len(columns))
    for where, (n, k) in (_TINY if quick else _SHAPES).items():
        cells = []
        for m, dtype in columns:
            print(f"  {where}, M={m}, {dtype_name(dtype)}", file=sys.stderr, flush=True)
            best = _best_seconds(Problem(n, k, m, dtype), budget)
            per_flop = best / (2.0 * m * n * k)
            relative = per_flop / reference.setdefault((m, dtype), per_flop)
            mark = " ▲" if relative > 1 + FLAT else ""
            cells.append(f"{per_flop * 1e12:.2f} ({relative:.2f}×{mark})")
            data.append(
                {
                    "where": where,
                    "m": m,
                    "dtype": dtype_name(dtype),
                    "best_seconds": best,
                    "seconds_per_flop": per_flop,
                    "to_reference": relative,
                }
            )
        lines.append(f"| {where} | " + " | ".join(cells) + " |")
    return Section(TITLE, "\n".join(lines), data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(section(args.quick).markdown)
