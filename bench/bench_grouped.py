"""Experts of a mixture: rows sorted by expert, each expert's with its own 4-bit matrix.

Every expert gets as many rows. The peers hold the stack un-quantized: torch's grouped_mm, which
transformers calls, and nn.functional.linear for one expert after the other.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import OURS, Call, Case, Contenders, Tier
from bench.data import matrix
from bench.harness import main
from bench.linear_layers import BLOCKSIZE
from qlora_native.experts import StackedLinear4bit

TITLE = "Experts of a mixture"

# Qwen3-30B-A3B's gate_up_proj, an eighth of its 128 experts.
_EXPERTS, _N, _K = 16, 1536, 2048
_DTYPES = (torch.float32, torch.bfloat16)


def _contenders(experts: int, n: int, k: int, m: int, dtype: torch.dtype) -> Contenders:
    ends = torch.arange(1, experts + 1, dtype=torch.int32) * (m // experts)

    def stack() -> Tensor:
        return matrix((experts * n, k), dtype, 0).view(experts, n, k)

    def without_grad(call: Call) -> Call:
        def timed() -> object:
            with torch.no_grad():
                return call()

        return timed

    def ours() -> Call:
        x, layer = matrix((m, k), dtype, 1), StackedLinear4bit.from_stack(stack())
        return without_grad(lambda: layer(x, ends))

    def grouped_mm() -> Call:
        x, weight = matrix((m, k), dtype, 1), stack().transpose(1, 2)
        return without_grad(lambda: F.grouped_mm(x, weight, offs=ends))

    def one_by_one() -> Call:
        rows, weight = matrix((m, k), dtype, 1).split(m // experts), stack()
        return without_grad(lambda: torch.cat(list(map(F.linear, rows, weight))))

    return {OURS: ours, "torch grouped_mm": grouped_mm, "torch, one by one": one_by_one}


def _case(experts: int, n: int, k: int, m: int, dtype: torch.dtype) -> Case:
    values, size = experts * n * k, dtype.itemsize
    contenders = _contenders(experts, n, k, m, dtype)
    return Case(
        "forward", f"{experts} experts of {n} × {k}", dtype, contenders, m,
        read=values // 2 + values // BLOCKSIZE + m * k * size, write=m * n * size,
        flops=2 * m * n * k, tier=Tier.REPORT,
    )  # fmt: skip


def cases(quick: bool) -> Iterator[Case]:
    for dtype in _DTYPES:
        if quick:
            yield _case(2, 48, 64, 6, dtype)
        else:
            for m in (16, 128, 1024):
                yield _case(_EXPERTS, _N, _K, m, dtype)


if __name__ == "__main__":
    main(TITLE, cases)
