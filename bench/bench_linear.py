"""The 4-bit linear layer: forward, input gradient, and with LoRA forward + backward.

The least that is moved: the codes, one byte of scale per 64 of them, x and the result. The LoRA
rows also time the base products alone (forward + input gradient without the branch).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench import linear_contenders as contenders
from bench.case import Case, Tier
from bench.harness import main
from bench.linear_layers import BLOCKSIZE, Problem
from bench.shapes import LLAMA3_8B, QWEN25_7B, SMOLLM2_135M, SQUARE_4096

TITLE = "4-bit linear"

_CORE, _REPORT, _FULL = Tier
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_TRAINED_ROWS = 512


def _forward(where: str, p: Problem, tier: Tier, compiled: bool = False) -> Case:
    size = p.dtype.itemsize
    return Case(
        "forward", where, p.dtype, contenders.forward(p, compiled), p.m,
        read=_weight_bytes(p) + p.m * p.k * size, write=p.m * p.n * size,
        flops=2 * p.m * p.n * p.k, tier=tier,
    )  # fmt: skip


def _training(where: str, p: Problem, tier: Tier, compiled: bool = False) -> Iterator[Case]:
    size, flops = p.dtype.itemsize, 2 * p.m * p.n * p.k
    x_bytes, y_bytes = p.m * p.k * size, p.m * p.n * size
    yield Case(
        "input gradient", where, p.dtype, contenders.input_gradient(p), p.m,
        read=_weight_bytes(p) + y_bytes, write=x_bytes, flops=flops, tier=tier,
    )  # fmt: skip
    yield _lora_step(where, p, tier, compiled)


def _lora_step(where: str, p: Problem, tier: Tier, compiled: bool = False) -> Case:
    size, flops = p.dtype.itemsize, 2 * p.m * p.n * p.k
    x_bytes, y_bytes = p.m * p.k * size, p.m * p.n * size
    return Case(
        f"LoRA r={contenders.RANK} forward + backward", where, p.dtype,
        contenders.lora(p, compiled), p.m,
        read=2 * _weight_bytes(p) + 2 * (x_bytes + y_bytes), write=x_bytes + y_bytes,
        flops=2 * flops, tier=tier,
    )  # fmt: skip


def _weight_bytes(p: Problem) -> int:
    return p.n * p.k // 2 + p.n * p.k // BLOCKSIZE


def _square(dtype: torch.dtype) -> Iterator[Case]:
    """The shape of the targets, with every number of rows."""
    where = "4096 × 4096"
    told = {1, 4, 16, 64, 512}
    core = {1, 16, 512} if dtype != torch.float16 else set()
    for m in _ROWS:
        problem = Problem(*SQUARE_4096, m, dtype)
        tier = _CORE if m in core else _REPORT if m in told else _FULL
        if m == 4096 and dtype != torch.float16:
            tier = _REPORT
        compiled = m in (1, _TRAINED_ROWS)
        yield _forward(where, problem, tier, compiled)
        if m == _TRAINED_ROWS:
            # torch's fp16 products of this layout take a minute each.
            trained = _FULL if dtype == torch.float16 else _CORE
            yield from _training(where, problem, trained, compiled)


def _smallest() -> Iterator[Case]:
    """What a call costs on the host: at 64 × 64 there is next to nothing to compute."""
    for m in (1, 16):
        yield _lora_step("64 × 64", Problem(64, 64, m, torch.float32), _REPORT)


def _models(dtype: torch.dtype) -> Iterator[Case]:
    """The linears of models: one row, as in generation, and a batch, as in training."""
    for model, batch in ((SMOLLM2_135M, 1024), (LLAMA3_8B, 512), (QWEN25_7B, 512)):
        for name in ("q_proj", "up_proj", "down_proj"):
            shape = model.linears[name]
            if shape == SQUARE_4096:
                continue
            where = f"{model.name} {name}"
            tier = _FULL if dtype == torch.float16 else _REPORT
            for m in (1, batch):
                yield _forward(where, Problem(*shape, m, dtype), tier)
            trained = tier if model is SMOLLM2_135M and name == "up_proj" else _FULL
            yield from _training(where, Problem(*shape, batch, dtype), trained)


def cases(quick: bool) -> Iterator[Case]:
    for dtype in _DTYPES:
        if quick:
            problem = Problem(48, 64, 6, dtype)
            yield _forward("48 × 64", problem, _CORE)
            yield from _training("48 × 64", problem, _CORE)
        else:
            yield from _square(dtype)
            yield from _models(dtype)
    if not quick:
        yield from _smallest()


if __name__ == "__main__":
    main(TITLE, cases)
