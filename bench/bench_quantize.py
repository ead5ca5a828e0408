"""Blockwise quantization and back: NF4 with double-quantized scales, and the dynamic 8-bit map.

The least that is moved, in bytes a value: a value of the matrix's dtype on one side, half a byte of
codes (8-bit: one) and the block's scale on the other. Fresh outputs also cost the kernel's handing
out of pages, which the limit leaves out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench import quantize_contenders as contenders
from bench.case import Case, Tier
from bench.harness import main
from bench.shapes import LLAMA3_8B, QWEN25_7B, SMOLLM2_135M, SQUARE_4096

TITLE = "Quantize and dequantize"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _cases_4bit(
    where: str, shape: tuple[int, int], dtype: torch.dtype, tier: Tier, compiled: bool
) -> Iterator[Case]:
    n = shape[0] * shape[1]
    values = n * dtype.itemsize
    blocks = n // contenders.BLOCKSIZE
    codes = n // 2 + blocks + blocks // 64
    fresh_tier = max(tier, Tier.REPORT)
    for op, made, case_tier in (
        ("quantize NF4 into reused outputs", contenders.quantize_reusing(shape, dtype), tier),
        (
            "quantize NF4 into fresh outputs",
            contenders.quantize_fresh(shape, dtype, compiled),
            fresh_tier,
        ),
    ):
        yield Case(op, where, dtype, made, read=values, write=codes, tier=case_tier)
    for op, made, case_tier in (
        ("dequantize NF4 into a reused output", contenders.dequantize_reusing(shape, dtype), tier),
        (
            "dequantize NF4 into a fresh output",
            contenders.dequantize_fresh(shape, dtype, compiled),
            fresh_tier,
        ),
    ):
        yield Case(op, where, dtype, made, read=codes, write=values, tier=case_tier)


def _cases_8bit(where: str, shape: tuple[int, int], tier: Tier) -> Iterator[Case]:
    n = shape[0] * shape[1]
    values, codes = 4 * n, n + 4 * n // contenders.BLOCKSIZE_8BIT
    yield Case(
        "quantize 8-bit into fresh outputs", where, torch.float32,
        contenders.quantize_8bit_fresh(shape), read=values, write=codes, tier=tier,
    )  # fmt: skip
    yield Case(
        "dequantize 8-bit into a fresh output", where, torch.float32,
        contenders.dequantize_8bit_fresh(shape), read=codes, write=values, tier=tier,
    )  # fmt: skip


def cases(quick: bool) -> Iterator[Case]:
    if quick:
        for dtype in _DTYPES:
            yield from _cases_4bit("64 × 96", (64, 96), dtype, Tier.CORE, compiled=False)
        yield from _cases_8bit("64 × 96", (64, 96), Tier.CORE)
        return
    for dtype in _DTYPES:
        core = Tier.REPORT if dtype == torch.float16 else Tier.CORE
        yield from _cases_4bit("4096 × 4096", SQUARE_4096, dtype, core, compiled=True)
    yield from _cases_8bit("4096 × 4096", SQUARE_4096, Tier.REPORT)
    for model in (SMOLLM2_135M, LLAMA3_8B, QWEN25_7B):
        where, shape = f"{model.name} up_proj", model.linears["up_proj"]
        for dtype in _DTYPES:
            told = model is not QWEN25_7B and dtype != torch.float16
            tier = Tier.REPORT if told else Tier.FULL
            yield from _cases_4bit(where, shape, dtype, tier, compiled=False)
        yield from _cases_8bit(where, shape, Tier.FULL)


if __name__ == "__main__":
    main(TITLE, cases)
