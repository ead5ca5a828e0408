"""One AdamW step: 32-bit state beside torch's fused one, 8-bit state beside the other 8-bit ones.

The least that is moved, in bytes a value: 32-bit state, four values read and three written; 8-bit,
parameter and gradient in and parameter out, a byte and 4/256 of a scale for each moment, both ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from bench.harness import OURS, Case, Contenders, main
from bench.peers import peer
from bench.shapes import SMOLLM2_135M, SQUARE_4096
from qlora_native.optim import AdamW, AdamW8bit

TITLE = "AdamW step"


def _parameters(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...], scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    parameters = [torch.nn.Parameter(random(shape, 0.02)) for shape in shapes]
    for parameter, shape in zip(parameters, shapes, strict=True):
        parameter.grad = random(shape, 1e-3)
    return parameters


def _contenders(
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    optimizers: dict[str, Callable[..., Optimizer]],
) -> Contenders:
    return {
        name: make(_parameters(shapes, dtype), lr=1e-4).step for name, make in optimizers.items()
    }


def _optimizers_32bit() -> dict[str, Callable[..., Optimizer]]:
    return {
        OURS: AdamW,
        "torch fused": lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True),
        "torch foreach": lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=True),
    }


def _optimizers_8bit(quick: bool) -> dict[str, Callable[..., Optimizer]]:
    optimizers: dict[str, Callable[..., Optimizer]] = {OURS: AdamW8bit}
    if bitsandbytes := peer("bitsandbytes"):
        optimizers["bitsandbytes"] = bitsandbytes.optim.AdamW8bit
    if not quick and (torchao := peer("torchao.optim")):  # compiles for a minute
        optimizers["torchao"] = torchao.AdamW8bit
    return optimizers


def _case(
    name: str,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    state_bytes: float,
    optimizers: Callable[[], dict[str, Callable[..., Optimizer]]],
) -> Case:
    n = sum(math.prod(shape) for shape in shapes)
    state = int(2 * state_bytes * n)
    return Case(
        name,
        lambda: _contenders(shapes, dtype, optimizers()),
        read=2 * dtype.itemsize * n + state,
        write=dtype.itemsize * n + state,
    )


def cases(quick: bool) -> Iterator[Case]:
    square = [(64, 96)] if quick else [SQUARE_4096]
    lora = [(4, 96), (64, 4)] if quick else SMOLLM2_135M.lora_shapes(r=16)
    square_name = "64 × 96" if quick else "4096 × 4096"
    lora_name = "LoRA r=4" if quick else f"{SMOLLM2_135M.name} LoRA r=16 ({len(lora)} tensors)"
    for dtype in (torch.float32, torch.bfloat16):
        short = str(dtype).removeprefix("torch.")
        yield _case(f"32-bit, {square_name}, {short}", square, dtype, 4, _optimizers_32bit)
        yield _case(
            f"8-bit, {square_name}, {short}",
            square,
            dtype,
            1 + 4 / 256,
            lambda: _optimizers_8bit(quick),
        )
    yield _case(f"32-bit, {lora_name}, float32", lora, torch.float32, 4, _optimizers_32bit)
    yield _case(
        f"8-bit, {lora_name}, float32",
        lora,
        torch.float32,
        1 + 4 / 256,
        lambda: _optimizers_8bit(quick),
    )


if __name__ == "__main__":
    main(TITLE, cases)
