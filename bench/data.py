"""Random matrices, the same for every contender, and made once for the contenders of a case."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=6)
def matrix(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal, of deviation 0.05. Shared: nobody may write into it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(shape).normal_(0.0, 0.05, generator=generator).to(dtype)
