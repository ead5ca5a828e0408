"""The same frozen weight as a layer of ours, of each peer, and un-quantized.

bitsandbytes 0.50.2 packs a layer anew in its first pass without gradient and has no input gradient
from then on: a layer that is trained here has never seen such a pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.data import matrix
from qlora_native.nn import Linear4bit

BLOCKSIZE = 64
NESTED_BLOCKSIZE_TORCHAO = 256

Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """y [m, n] = x [m, k] W^T, all in one dtype."""

    n: int
    k: int
    m: int
    dtype: torch.dtype

    @property
    def weight(self) -> Tensor:
        return matrix((self.n, self.k), self.dtype, 0)

    @property
    def x(self) -> Tensor:
        return matrix((self.m, self.k), self.dtype, 1)

    @property
    def grad_out(self) -> Tensor:
        return matrix((self.m, self.n), self.dtype, 2)


def unquantized(problem: Problem) -> torch.nn.Linear:
    layer = torch.nn.Linear(problem.k, problem.n, bias=False, dtype=problem.dtype, device="meta")
    layer.weight = torch.nn.Parameter(problem.weight, requires_grad=False)
    return layer


def ours(problem: Problem) -> Linear4bit:
    return Linear4bit.from_linear(unquantized(problem), blocksize=BLOCKSIZE)


def bitsandbytes(problem: Problem) -> torch.nn.Module:
    """NF4, double-quantized."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        problem.k, problem.n, bias=False, compute_dtype=problem.dtype, compress_statistics=True,
        quant_type="nf4",
    )  # fmt: skip
    layer.weight = bnb.nn.Params4bit(
        problem.weight.clone(), requires_grad=False, compress_statistics=True, quant_type="nf4"
    )
    return layer.to("cpu")


def torchao_nf4(problem: Problem) -> Layer:
    """NF4, double-quantized; the product compiled, with the dequantizing in it."""
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4, to_nf4

    weight = to_nf4(problem.weight, BLOCKSIZE, NESTED_BLOCKSIZE_TORCHAO)
    linear = torch.compile(linear_nf4)
    return lambda x: linear(x, weight)


def torchao_int4(problem: Problem) -> Layer:
    """Integers of 4 bits with a scale and a zero for 64 of them, packed for torch's kernel.

    Without gradient. Its fast path is for bf16 alone: in fp32 and fp16 it takes a hundred times
    as long (4096 × 4096, M = 4).
    """
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

    weight = Int4OpaqueTensor.from_hp(problem.weight, [1, BLOCKSIZE])
    return lambda x: torch.nn.functional.linear(x, weight)
