"""Who quantizes a matrix in blocks, and back: ours, bitsandbytes, and torchao compiled.

Outputs are fresh for all, or reused by all; of the peers none can reuse them (bitsandbytes'
dequantize_4bit refuses its out= on a CPU), so those rows have ours alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.case import COMPILED, OURS, Call, Contenders
from bench.data import matrix
from bench.peers import installed
from qlora_native import ops

BLOCKSIZE = 64
BLOCKSIZE_8BIT = 256
NESTED_BLOCKSIZE_TORCHAO = 256

Shape = tuple[int, int]


def quantize_reusing(shape: Shape, dtype: torch.dtype) -> Contenders:
    """Codes and absmax into reused outputs; the absmax to 8 bits (1/64 of the values)."""

    def ours() -> Call:
        x = matrix(shape, dtype)
        packed, absmax = ops.quantize_4bit(x, BLOCKSIZE, "nf4")

        def call() -> object:
            ops.quantize_4bit_out(x, packed, absmax, BLOCKSIZE, "nf4")
            return ops.quantize_scales(absmax)

        return call

    return {OURS: ours}


def quantize_fresh(shape: Shape, dtype: torch.dtype, compiled: bool) -> Contenders:
    def ours() -> Call:
        x = matrix(shape, dtype)

        def call() -> object:
            packed, absmax = ops.quantize_4bit(x, BLOCKSIZE, "nf4")
            return packed, ops.quantize_scales(absmax)

        return call

    def bitsandbytes() -> Call:
        import bitsandbytes.functional as bnb

        x = matrix(shape, dtype)
        return lambda: bnb.quantize_4bit(
            x, blocksize=BLOCKSIZE, compress_statistics=True, quant_type="nf4"
        )

    def torchao() -> Call:
        x = matrix(shape, dtype)
        quantize = torch.compile(_to_nf4)
        return lambda: quantize(x)

    return _those_installed(ours, bitsandbytes, torchao if compiled else None)


def dequantize_reusing(shape: Shape, dtype: torch.dtype) -> Contenders:
    def ours() -> Call:
        packed, scales = _quantized(shape, dtype)
        out = torch.empty(shape, dtype=dtype)
        return lambda: ops.dequantize_4bit_out(packed, *scales, out, BLOCKSIZE, "nf4")

    return {OURS: ours}


def dequantize_fresh(shape: Shape, dtype: torch.dtype, compiled: bool) -> Contenders:
    def ours() -> Call:
        packed, scales = _quantized(shape, dtype)
        return lambda: ops.dequantize_4bit(packed, *scales, shape, BLOCKSIZE, "nf4", dtype)

    def bitsandbytes() -> Call:
        import bitsandbytes.functional as bnb

        codes, state = bnb.quantize_4bit(
            matrix(shape, dtype), blocksize=BLOCKSIZE, compress_statistics=True, quant_type="nf4"
        )
        return lambda: bnb.dequantize_4bit(codes, state)

    def torchao() -> Call:
        weight = _to_nf4(matrix(shape, dtype))
        dequantize = torch.compile(_from_nf4)
        return lambda: dequantize(weight)

    return _those_installed(ours, bitsandbytes, torchao if compiled else None)


def quantize_8bit_fresh(shape: Shape) -> Contenders:
    def ours() -> Call:
        x = matrix(shape, torch.float32)
        return lambda: ops.quantize_8bit(x, BLOCKSIZE_8BIT)

    def bitsandbytes() -> Call:
        import bitsandbytes.functional as bnb

        x = matrix(shape, torch.float32)
        return lambda: bnb.quantize_blockwise(x, blocksize=BLOCKSIZE_8BIT)

    return _those_installed(ours, bitsandbytes)


def dequantize_8bit_fresh(shape: Shape) -> Contenders:
    def ours() -> Call:
        codes, absmax = ops.quantize_8bit(matrix(shape, torch.float32), BLOCKSIZE_8BIT)
        return lambda: ops.dequantize_8bit(codes, absmax, BLOCKSIZE_8BIT)

    def bitsandbytes() -> Call:
        import bitsandbytes.functional as bnb

        codes, state = bnb.quantize_blockwise(
            matrix(shape, torch.float32), blocksize=BLOCKSIZE_8BIT
        )
        return lambda: bnb.dequantize_blockwise(codes, state)

    return _those_installed(ours, bitsandbytes)


def _those_installed(
    ours: Callable[[], Call],
    bitsandbytes: Callable[[], Call],
    torchao: Callable[[], Call] | None = None,
) -> Contenders:
    contenders: Contenders = {OURS: ours}
    if installed("bitsandbytes"):
        contenders["bitsandbytes"] = bitsandbytes
    if torchao is not None and installed("torchao"):
        contenders[f"torchao{COMPILED}"] = torchao
    return contenders


def _quantized(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    packed, absmax = ops.quantize_4bit(matrix(shape, dtype), BLOCKSIZE, "nf4")
    return packed, ops.quantize_scales(absmax)


def _to_nf4(x: Tensor) -> Tensor:
    from torchao.quantization import NF4Tensor

    return NF4Tensor.from_tensor(x, BLOCKSIZE, NESTED_BLOCKSIZE_TORCHAO)


def _from_nf4(weight: Tensor) -> Tensor:
    original: Tensor = weight.get_original_weight()  # type: ignore[attr-defined]
    return original
