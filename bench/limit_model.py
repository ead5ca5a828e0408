"""The least time that a case can take on a machine of measured limits.

FLOPs over the multiply-add rate, bytes over the bandwidth: the larger one. A benchmark repeats its
call, so data stay in the caches from one call to the next; in which, tells the working set. Two
ways of using the caches are allowed for, and the limit is the faster one:

- all that is touched takes its turn: bandwidth is that of a working set of all bytes;
- the smaller of what is read and what is written stays in the caches, and the larger passes by
  (non-temporal stores do that): each side at the bandwidth of its own size, at the same time.

In both, reading alone, writing alone and all together are each held to their own best rate.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.case import Case
from bench.limits import ANY, READ, WRITE, Limits

# Above this share of its limit a row says that the limit is wrong, and is marked.
BEYOND = 1.05

# Rate of the instruction set's own dtype; other dtypes are computed in fp32.
_WIDENED = {"avx512bf16": "avx512"}


def least_seconds(case: Case, limits: Limits, isa: str) -> float:
    return max(_moving(case, limits), case.flops / limits.flops[_flops_isa(case, isa)])


# Where FLOPs take so many times as long as moving, what the memory does now is of no interest.
_COMPUTES = 4.0


def working_sets(case: Case, limits: Limits, isas: Sequence[str]) -> list[int]:
    """Bytes of the working sets whose bandwidth decides, where the memory's does."""
    flops = min(case.flops / limits.flops[_flops_isa(case, isa)] for isa in isas)
    if flops > _COMPUTES * _moving(case, limits):
        return []
    touched = case.read + (0 if case.in_place else case.write)
    return sorted({touched} if case.in_place else {touched, case.read, case.write})


def _flops_isa(case: Case, isa: str) -> str:
    has_own_products = str(case.dtype) == "torch.bfloat16"
    return isa if has_own_products else _WIDENED.get(isa, isa)


def _moving(case: Case, limits: Limits) -> float:
    moved = case.read + case.write
    if moved == 0:
        return 0.0
    touched = case.read if case.in_place else moved
    in_turn = max(
        case.read / limits.rate(READ, touched),
        case.write / limits.rate(WRITE, touched),
        moved / limits.rate(ANY, touched),
    )
    if case.in_place:
        return in_turn
    passing_by = max(
        case.read / limits.rate(READ, max(case.read, 1)),
        case.write / limits.rate(WRITE, max(case.write, 1)),
    )
    return min(in_turn, passing_by)
