"""Inputs for the quantization tests, by name, and equality to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

FORMATS = ["nf4", "fp4"]
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

_INT_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def lengths(blocksize: int) -> list[int]:
    """Numbers of values that end inside, at and past a block, a vector, a byte."""
    return [1, 2, 31, 32, 33, blocksize - 1, blocksize, blocksize + 1, 3 * blocksize + 7]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Same dtype, number and bits of values, in whatever shape; any NaN equals any other."""
    a, b = a.detach().reshape(-1), b.detach().reshape(-1)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integer = _INT_OF_SIZE[a.element_size()]
    return bool(((a.view(integer) == b.view(integer)) | ((a != a) & (b != b))).all())


def _around(values: Tensor, n: int, blocksize: int, generator: torch.Generator) -> Tensor:
    """n of these values and of their neighbours 1 ulp away; blocks scaled by powers of two."""
    up = torch.nextafter(values, torch.tensor(torch.inf))
    down = torch.nextafter(values, torch.tensor(-torch.inf))
    candidates = torch.cat([values, up, down])
    x = candidates[torch.randint(candidates.numel(), (n,), generator=generator)]
    x[::blocksize] = 1.0
    exponents = torch.randint(-20, 20, (-(-n // blocksize),), generator=generator)
    return x * torch.exp2(exponents.float()).repeat_interleave(blocksize)[:n]


def inputs(n: int, blocksize: int, codebook: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Named fp32 inputs of n values."""
    generator = torch.Generator().manual_seed(n)

    def randn() -> Tensor:
        return torch.randn(n, generator=generator)

    def somewhere() -> Tensor:
        return torch.randint(n, (1 + n // 200,), generator=generator)

    values = codebook.sort().values
    yield "normal", randn()
    yield "subnormal", randn() * 1e-39
    yield "huge", randn().clamp(-3, 3) * 1e38
    yield "wide", randn() * 10 ** (-7 * torch.rand(n, generator=generator))
    tiny_beside_huge = randn() * 1e-39
    tiny_beside_huge[::3] *= 1e30
    tiny_beside_huge[::3] *= 1e16
    yield "tiny beside huge", tiny_beside_huge
    yield "all zero", torch.zeros(n)
    yield "negative zero", -torch.zeros(n)
    some_blocks = randn()
    some_blocks[:blocksize] = 0.0
    some_blocks[blocksize : 2 * blocksize] = -1.25
    yield "a zero and a constant block", some_blocks
    yield "codebook", _around(values, n, blocksize, generator)
    yield "midpoints", _around((values[:-1] + values[1:]) / 2, n, blocksize, generator)
    for name, value in (("nan", torch.nan), ("inf", torch.inf), ("-inf", -torch.inf)):
        special = randn()
        special[somewhere()] = value
        yield name, special
    mixed = randn()
    for value in (torch.nan, torch.inf, -torch.inf, 0.0, 1e-45):
        mixed[somewhere()] = value
    yield "mixed", mixed


def cases(blocksize: int, codebook: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Every input over two blocks and a tail; every length with ordinary and special values."""
    yield from ((name, x) for name, x in inputs(2 * blocksize + 7, blocksize, codebook))
    for n in lengths(blocksize):
        for name, x in inputs(n, blocksize, codebook):
            if name in ("normal", "midpoints", "mixed"):
                yield f"{name}, {n} values", x
