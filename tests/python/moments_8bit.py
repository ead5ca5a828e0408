"""8-bit blockwise moments, written in torch: what the optimizers' kernels do, to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

import qlora_native

BLOCKSIZE = 256


def nearest_code(x: Tensor, signed: bool) -> Tensor:
    """The code nearest to x in [-1, 1] by fp32 midpoints, a tie to the even code."""
    values = torch.tensor(qlora_native.dynamic_map(signed))
    midpoints = (values[:-1] + values[1:]) / 2
    lower = torch.bucketize(x, midpoints)
    upper = torch.bucketize(x, midpoints, right=True)
    return torch.where(lower % 2 == 0, lower, upper).to(torch.uint8)


def per_value(absmax: Tensor, n: int) -> Tensor:
    return absmax.repeat_interleave(BLOCKSIZE)[:n]


def encode(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    n, n_blocks = x.numel(), -(-x.numel() // BLOCKSIZE)
    padded = torch.nn.functional.pad(x, (0, n_blocks * BLOCKSIZE - n))
    absmax = padded.view(n_blocks, BLOCKSIZE).abs().amax(dim=1)
    has_normal_inverse = (absmax >= 2.0**-120) & (absmax <= 2.0**120)
    divisor = torch.where(absmax == 0, 1.0, absmax)
    normed = torch.where(
        per_value(has_normal_inverse, n),
        x * per_value(1.0 / absmax, n),
        x / per_value(divisor, n),
    )
    return nearest_code(normed, signed), absmax


def decode(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    values = torch.tensor(qlora_native.dynamic_map(signed))
    return values[codes.long()] * per_value(absmax, codes.numel())
