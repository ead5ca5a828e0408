"""Quantize, dequantize and multiply, on tensors and a `QuantState`.

The thinnest layer that keeps a weight's scales and layout together; qlora_native.ops has the ops
with every part an argument of its own. Shapes: M tokens, N out_features, K in_features, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_native import autograd, ops
from qlora_native.quant_state import QuantState

__all__ = [
    "QuantState",
    "dequantize_4bit",
    "dequantize_8bit",
    "linear_4bit",
    "qlora_linear",
    "quantize_4bit",
    "quantize_8bit",
]


def quantize_4bit(
    x: Tensor,
    blocksize: int = 64,
    format: str = "nf4",
    double_quant: bool = False,
    *,
    scale_rounding: str = "nearest",
    allow_nonfinite: bool = False,
    name: str = "x",
    out: Tensor | None = None,
) -> tuple[Tensor, QuantState]:
    """Quantize x to 4 bits in blocks that share a scale (QLoRA, section 3).

    Args:
        x: any shape, n values, float32, float16 or bfloat16.
        blocksize: a power of two, 32 to 4096.
        format: "nf4" or "fp4".
        double_quant: quantize the scales too, to 8 bits in blocks of 256.
        scale_rounding: of the scales' codes. "nearest", as bitsandbytes does on CUDA, or
            "bitsandbytes_cpu", its result on a CPU bit for bit (0.1 % of the codes differ by one).
        allow_nonfinite: quantize a tensor with Inf or NaN nevertheless. Without double_quant such
            a value spoils its own block alone; with it, the mean of the scales, and so all of them.
        name: what errors call x.
        out: uint8, ceil(n/2) bytes, filled and returned as packed.

    Returns:
        packed uint8 [ceil(n/2), 1], two codes a byte, the first one high; and the state that
        dequantize_4bit needs.

    Raises:
        ValueError: a bad argument, or Inf or NaN in x with double_quant.
        TypeError: a wrong dtype.
    """
    if out is None:
        packed, absmax = ops.quantize_4bit(x, blocksize, format)
    else:
        packed = out
        absmax = x.new_empty(-(-x.numel() // max(blocksize, 1)), dtype=torch.float32)
        ops.quantize_4bit_out(x, packed, absmax, blocksize, format)
    state = QuantState(absmax, x.shape, x.dtype, blocksize, format)
    if double_quant:
        if not allow_nonfinite:
            _refuse_nonfinite(x, absmax, name)
        # bitsandbytes subtracts torch's mean, whose last bits are not those of the exact one.
        offset = absmax.mean().view(1) if scale_rounding == "bitsandbytes_cpu" else None
        codes, nested_absmax, nested_offset = ops.quantize_scales(absmax, scale_rounding, offset)
        state = QuantState(codes, x.shape, x.dtype, blocksize, format, nested_absmax, nested_offset)
    return packed.view(state.packed_shape) if out is None else out, state


def _refuse_nonfinite(x: Tensor, absmax: Tensor, name: str) -> None:
    # A block's absmax is finite exactly when its values are: x itself is read only to count.
    if absmax.is_meta or bool(torch.isfinite(absmax).all()):
        return
    n_nan, n_inf = int(x.isnan().sum()), int(x.isinf().sum())
    raise ValueError(
        f"{name} {list(x.shape)} holds {n_nan} NaN and {n_inf} Inf: with double_quant=True they "
        "would make every scale of it non-finite. Repair the weight, or pass double_quant=False "
        "(they then spoil their own blocks alone) or allow_nonfinite=True"
    )


def dequantize_4bit(
    packed: Tensor,
    state: QuantState,
    dtype: torch.dtype | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The values that the codes stand for: codebook[code] * absmax of its block, rounded to dtype.

    Args:
        packed: what quantize_4bit gave; any dtype viewing the same bytes.
        state: the same's.
        dtype: of the result; that of the quantized tensor by default.
        out: of state.shape, contiguous, filled and returned; its dtype is the result's.

    Raises:
        ValueError: packed has not the bytes that state.shape needs, or out another shape.
    """
    packed = state.check_packed(packed)
    nested = (state.nested_absmax, state.nested_offset)
    if out is None:
        dtype = state.dtype if dtype is None else dtype
        return ops.dequantize_4bit(
            packed, state.absmax, *nested, state.shape, state.blocksize, state.format, dtype
        )
    if dtype is not None and dtype != out.dtype:
        raise ValueError(f"dtype must be out's, {out.dtype}, or left out, got {dtype}")
    if out.shape != state.shape:
        raise ValueError(f"out must have shape {list(state.shape)}, got {list(out.shape)}")
    ops.dequantize_4bit_out(packed, state.absmax, *nested, out, state.blocksize, state.format)
    return out


def quantize_8bit(
    x: Tensor, blocksize: int = 256, signed: bool = True, rounding: str = "nearest"
) -> tuple[Tensor, Tensor]:
    """Quantize x to the dynamic 8-bit map, blockwise (8-bit optimizers, section 2).

    Args:
        x: any shape, n values, float32, float16 or bfloat16.
        blocksize: values that share an absmax.
        signed: the map; the unsigned one has no negative values.
        rounding: "nearest", a tie to the even code, or "bitsandbytes_cpu".

    Returns:
        codes uint8 in x's shape, absmax float32 [ceil(n/blocksize)].
    """
    return ops.quantize_8bit(x, blocksize, signed, rounding)


def dequantize_8bit(
    codes: Tensor,
    absmax: Tensor,
    blocksize: int = 256,
    signed: bool = True,
    dtype: torch.dtype = torch.float32,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The values of quantize_8bit's codes, in their shape; into out, where one is given."""
    if out is None:
        return ops.dequantize_8bit(codes, absmax, blocksize, signed, dtype)
    ops.dequantize_8bit_out(codes, absmax, out, blocksize, signed)
    return out


def linear_4bit(x: Tensor, packed: Tensor, state: QuantState, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias, W [N, K] read as 4-bit, never held as floats.

    Differentiable in x and bias.

    Args:
        x: [..., K].
        packed, state: of W.
        bias: [N], cast to x's dtype.

    Returns:
        [..., N] of x's dtype.
    """
    return autograd.linear_4bit(
        x,
        packed,
        state.absmax,
        state.nested_absmax,
        state.nested_offset,
        _matrix_shape(state)[0],
        state.blocksize,
        state.format,
        bias,
    )


def qlora_linear(
    x: Tensor,
    packed: Tensor,
    state: QuantState,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias + scale * (drop(x) A^T) B^T in one op (QLoRA, eq. 5).

    Differentiable in x, bias, lora_a and lora_b.

    Args:
        x: [..., K].
        packed, state: of W [N, K], frozen.
        bias: [N], cast to x's dtype, or None.
        lora_a, lora_b: A [R, K] and B [N, R].
        scale: alpha / R, or alpha / sqrt(R) for rsLoRA.
        dropout_p: share of x's elements that the LoRA branch does not see.
        seed: int64 [1], of the dropout mask; needed where dropout_p > 0.

    Returns:
        [..., N] of x's dtype.
    """
    _matrix_shape(state)
    return autograd.qlora_linear(
        x,
        packed,
        state.absmax,
        state.nested_absmax,
        state.nested_offset,
        state.blocksize,
        state.format,
        bias,
        lora_a,
        lora_b,
        scale,
        dropout_p,
        seed,
    )


def _matrix_shape(state: QuantState) -> tuple[int, int]:
    if len(state.shape) != 2:
        raise ValueError(f"state must be of a matrix [N, K], got shape {list(state.shape)}")
    return state.shape[0], state.shape[1]
