"""One AdamW step: 32-bit state beside torch's fused one, 8-bit state beside the other 8-bit ones.

All work in place. The least that is moved, in bytes a value: 32-bit state, four values read and
three written; 8-bit, parameter and gradient in and parameter out, a byte and 4/256 of a scale for
each moment, both ways. torchao compiles its step by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from bench.case import COMPILED, OURS, Call, Case, Contenders, Tier
from bench.harness import main
from bench.peers import installed
from bench.shapes import LLAMA3_8B, SMOLLM2_135M, SQUARE_4096
from qlora_native.optim import AdamW, AdamW8bit

TITLE = "AdamW step"

Shapes = Sequence[tuple[int, ...]]
Optimizers = dict[str, Callable[..., Optimizer]]


def _parameters(shapes: Shapes, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...], scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    parameters = [torch.nn.Parameter(random(shape, 0.02)) for shape in shapes]
    for parameter, shape in zip(parameters, shapes, strict=True):
        parameter.grad = random(shape, 1e-3)
    return parameters


def _contenders(shapes: Shapes, dtype: torch.dtype, optimizers: Optimizers) -> Contenders:
    def maker(make: Callable[..., Optimizer]) -> Callable[[], Call]:
        return lambda: make(_parameters(shapes, dtype), lr=1e-4).step

    return {name: maker(make) for name, make in optimizers.items()}


def _bitsandbytes(parameters: list[torch.nn.Parameter], lr: float) -> Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, lr=lr)


def _torchao(parameters: list[torch.nn.Parameter], lr: float) -> Optimizer:
    import torchao.optim

    return torchao.optim.AdamW8bit(parameters, lr=lr)


def _optimizers_32bit() -> Optimizers:
    return {
        OURS: AdamW,
        "torch fused": lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True),
        "torch foreach": lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=True),
    }


def _optimizers_8bit(quick: bool) -> Optimizers:
    optimizers: Optimizers = {OURS: AdamW8bit}
    if installed("bitsandbytes"):
        optimizers["bitsandbytes"] = _bitsandbytes
    if not quick and installed("torchao"):
        optimizers[f"torchao{COMPILED}"] = _torchao
    return optimizers


def _pair(
    where: str, shapes: Shapes, dtype: torch.dtype, tier: Tier, quick: bool
) -> Iterator[Case]:
    """32-bit and 8-bit."""
    n = sum(math.prod(shape) for shape in shapes)
    for bits, state_bytes, optimizers in (
        (32, 4.0, _optimizers_32bit()),
        (8, 1 + 4 / 256, _optimizers_8bit(quick)),
    ):
        state = int(2 * state_bytes * n)
        yield Case(
            f"AdamW {bits}-bit",
            where,
            dtype,
            _contenders(shapes, dtype, optimizers),
            read=2 * dtype.itemsize * n + state,
            write=dtype.itemsize * n + state,
            in_place=True,
            tier=tier,
        )


def cases(quick: bool) -> Iterator[Case]:
    if quick:
        for dtype in (torch.float32, torch.bfloat16):
            yield from _pair("64 × 96", [(64, 96)], dtype, Tier.CORE, quick)
        return
    for dtype, tier in (
        (torch.float32, Tier.CORE),
        (torch.bfloat16, Tier.REPORT),
        (torch.float16, Tier.FULL),
    ):
        yield from _pair("4096 × 4096", [SQUARE_4096], dtype, tier, quick)
    for model, dtype, tier in (
        (SMOLLM2_135M, torch.float32, Tier.REPORT),
        (SMOLLM2_135M, torch.bfloat16, Tier.FULL),
        (LLAMA3_8B, torch.float32, Tier.FULL),
    ):
        shapes = model.lora_shapes(r=16)
        where = f"{model.name} LoRA r=16 ({len(shapes)} tensors)"
        yield from _pair(where, shapes, dtype, tier, quick)


if __name__ == "__main__":
    main(TITLE, cases)
