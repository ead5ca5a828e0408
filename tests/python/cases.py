"""Small inputs for every op, shared by the tests that go over all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_native import ops


@dataclass(frozen=True)
class Weight:
    """A random 4-bit weight [out_features, in_features] as the ops take it."""

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    out_features: int
    in_features: int
    blocksize: int = 64
    format: str = "nf4"

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.packed, self.absmax, self.nested_absmax, self.nested_offset

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        shape = (self.out_features, self.in_features)
        return ops.dequantize_4bit(*self.tensors, shape, self.blocksize, self.format, dtype)


def make_weight(
    out_features: int, in_features: int, *, double_quant: bool = True, blocksize: int = 64
) -> Weight:
    generator = torch.Generator().manual_seed(out_features * 1009 + in_features)
    dense = torch.randn(out_features, in_features, generator=generator) / max(in_features, 1) ** 0.5
    packed, absmax = ops.quantize_4bit(dense, blocksize)
    nested = (None, None)
    if double_quant:
        absmax, *nested = ops.quantize_scales(absmax)
    return Weight(packed, absmax, *nested, out_features, in_features, blocksize)
