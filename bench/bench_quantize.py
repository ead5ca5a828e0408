"""Blockwise quantization and back: NF4 with double-quantized scales, the dynamic 8-bit map, scales.

The least that is moved, in bytes a value: a value of the matrix's dtype on one side, half a byte of
codes (8-bit: one) and the block's scale on the other. Ours writes into reused outputs unless the
row says otherwise; bitsandbytes cannot (its out= raises): each direction has a row with fresh ones.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.harness import OURS, Case, Contenders, main
from bench.peers import peer
from bench.shapes import LLAMA3_8B, SMOLLM2_135M, SQUARE_4096
from qlora_native import ops

TITLE = "Quantize and dequantize"
BLOCKSIZE = 64


def _matrix(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape, generator=generator) * 0.02).to(dtype)


def _quantize(shape: tuple[int, int], dtype: torch.dtype, reuse: bool) -> Contenders:
    """Codes, absmax, and the absmax to 8 bits, into reused or fresh outputs."""
    x = _matrix(shape, dtype)
    packed, absmax = ops.quantize_4bit(x, BLOCKSIZE, "nf4")

    def reused() -> object:
        ops.quantize_4bit_out(x, packed, absmax, BLOCKSIZE, "nf4")
        return ops.quantize_scales(absmax)

    def fresh() -> object:
        codes, scales = ops.quantize_4bit(x, BLOCKSIZE, "nf4")
        return codes, ops.quantize_scales(scales)

    contenders: Contenders = {OURS: reused if reuse else fresh}
    if bnb := peer("bitsandbytes.functional"):
        contenders["bitsandbytes"] = lambda: bnb.quantize_4bit(
            x, blocksize=BLOCKSIZE, compress_statistics=True, quant_type="nf4"
        )
    return contenders


def _dequantize(shape: tuple[int, int], dtype: torch.dtype, out: torch.Tensor | None) -> Contenders:
    """Into the given output, or into a fresh one every time."""
    packed, absmax = ops.quantize_4bit(_matrix(shape, dtype), BLOCKSIZE, "nf4")
    scales = ops.quantize_scales(absmax)

    def ours() -> object:
        if out is None:
            return ops.dequantize_4bit(packed, *scales, shape, BLOCKSIZE, "nf4", dtype)
        return ops.dequantize_4bit_out(packed, *scales, out, BLOCKSIZE, "nf4")

    contenders: Contenders = {OURS: ours}
    if bnb := peer("bitsandbytes.functional"):
        codes, state = bnb.quantize_4bit(
            _matrix(shape, dtype), blocksize=BLOCKSIZE, compress_statistics=True, quant_type="nf4"
        )
        contenders["bitsandbytes"] = lambda: bnb.dequantize_4bit(codes, state)
    return contenders


def _quantize_8bit(shape: tuple[int, int]) -> Contenders:
    x = _matrix(shape, torch.float32)
    codes, absmax = ops.quantize_8bit(x, 256)
    contenders: Contenders = {OURS: lambda: ops.quantize_8bit_out(x, codes, absmax, 256)}
    if bnb := peer("bitsandbytes.functional"):
        contenders["bitsandbytes"] = lambda: bnb.quantize_blockwise(x, blocksize=256)
    return contenders


def _dequantize_8bit(shape: tuple[int, int]) -> Contenders:
    x = _matrix(shape, torch.float32)
    codes, absmax = ops.quantize_8bit(x, 256)
    contenders: Contenders = {OURS: lambda: ops.dequantize_8bit_out(codes, absmax, x, 256)}
    if bnb := peer("bitsandbytes.functional"):
        theirs, state = bnb.quantize_blockwise(x, blocksize=256)
        contenders["bitsandbytes"] = lambda: bnb.dequantize_blockwise(theirs, state)
    return contenders


def cases(quick: bool) -> Iterator[Case]:
    shapes = {"4096 × 4096": SQUARE_4096}
    if not quick:
        shapes[f"{SMOLLM2_135M.name} up_proj"] = SMOLLM2_135M.linears["up_proj"]
        shapes[f"{LLAMA3_8B.name} up_proj"] = LLAMA3_8B.linears["up_proj"]
    else:
        shapes = {"64 × 96": (64, 96)}
    for where, shape in shapes.items():
        n = shape[0] * shape[1]
        codes_4bit = n // 2 + n // BLOCKSIZE + n // (BLOCKSIZE * 64)
        codes_8bit = n + n // 64
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            short = str(dtype).removeprefix("torch.")
            values = n * dtype.itemsize
            yield Case(
                f"quantize NF4, {where}, {short}",
                lambda s=shape, d=dtype: _quantize(s, d, reuse=True),
                read=values,
                write=codes_4bit,
            )
            yield Case(
                f"dequantize NF4, {where}, {short}",
                lambda s=shape, d=dtype: _dequantize(s, d, torch.empty(s, dtype=d)),
                read=codes_4bit,
                write=values,
            )
        yield Case(
            f"quantize NF4 into fresh outputs, {where}, bfloat16",
            lambda s=shape: _quantize(s, torch.bfloat16, reuse=False),
            read=2 * n,
            write=codes_4bit,
        )
        yield Case(
            f"dequantize NF4 into a fresh output, {where}, bfloat16",
            lambda s=shape: _dequantize(s, torch.bfloat16, None),
            read=codes_4bit,
            write=2 * n,
        )
        yield Case(
            f"quantize 8-bit, {where}, float32",
            lambda s=shape: _quantize_8bit(s),
            read=4 * n,
            write=codes_8bit,
        )
        yield Case(
            f"dequantize 8-bit, {where}, float32",
            lambda s=shape: _dequantize_8bit(s),
            read=codes_8bit,
            write=4 * n,
        )


if __name__ == "__main__":
    main(TITLE, cases)
