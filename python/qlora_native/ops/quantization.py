"""Values to codes and back: 4 bits, 8 bits, and the scales of double quantization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from qlora_native import _load as _load
from qlora_native._errors import python_errors

_ops: Any = torch.ops.qlora_native
_quantize_4bit = _ops.quantize_4bit.default
_quantize_4bit_out = _ops.quantize_4bit.out
_dequantize_4bit = _ops.dequantize_4bit.default
_dequantize_4bit_out = _ops.dequantize_4bit.out
_quantize_8bit = _ops.quantize_8bit.default
_quantize_8bit_out = _ops.quantize_8bit.out
_dequantize_8bit = _ops.dequantize_8bit.default
_dequantize_8bit_out = _ops.dequantize_8bit.out
_quantize_scales = _ops.quantize_scales.default
_dequantize_scales = _ops.dequantize_scales.default


@python_errors
def quantize_4bit(x: Tensor, blocksize: int = 64, format: str = "nf4") -> tuple[Tensor, Tensor]:
    """Quantize x, flattened, in blocks that share one absmax (QLoRA, section 3).

    Args:
        x: any shape, n values, floating.

    Returns:
        packed uint8 [ceil(n/2)] and absmax float32 [n_blocks].
    """
    return cast(tuple[Tensor, Tensor], _quantize_4bit(x, blocksize, format))


@python_errors
def quantize_4bit_out(
    x: Tensor, packed: Tensor, absmax: Tensor, blocksize: int = 64, format: str = "nf4"
) -> None:
    """quantize_4bit into packed (uint8, ceil(n/2) bytes in any shape) and absmax."""
    _quantize_4bit_out(x, blocksize, format, packed=packed, absmax=absmax)


@python_errors
def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    blocksize: int = 64,
    format: str = "nf4",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The values of a 4-bit weight: codebook[code] * absmax of its block, rounded to dtype.

    Returns:
        a tensor of that shape and dtype.
    """
    return cast(
        Tensor,
        _dequantize_4bit(
            packed, absmax, nested_absmax, nested_offset, shape, blocksize, format, dtype
        ),
    )


@python_errors
def dequantize_4bit_out(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    out: Tensor,
    blocksize: int = 64,
    format: str = "nf4",
) -> None:
    """dequantize_4bit into out, whose shape and dtype say what is wanted."""
    _dequantize_4bit_out(packed, absmax, nested_absmax, nested_offset, blocksize, format, out=out)


@python_errors
def quantize_8bit(
    x: Tensor, blocksize: int = 256, signed: bool = True, rounding: str = "nearest"
) -> tuple[Tensor, Tensor]:
    """Quantize x, flattened, into the dynamic 8-bit map (8-bit Optimizers, section 2.1).

    Args:
        x: any shape, n values, floating.
        signed: which map; the unsigned one has no code for negative values.
        rounding: "nearest" (a tie to the even code), or "bitsandbytes_cpu" for the codes that
            bitsandbytes 0.50 gives on a CPU.

    Returns:
        codes uint8 in x's shape and absmax float32 [n_blocks].
    """
    return cast(tuple[Tensor, Tensor], _quantize_8bit(x, blocksize, signed, rounding))


@python_errors
def quantize_8bit_out(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    blocksize: int = 256,
    signed: bool = True,
    rounding: str = "nearest",
) -> None:
    """quantize_8bit into codes (uint8, x's shape) and absmax."""
    _quantize_8bit_out(x, blocksize, signed, rounding, codes=codes, absmax=absmax)


@python_errors
def dequantize_8bit(
    codes: Tensor,
    absmax: Tensor,
    blocksize: int = 256,
    signed: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """map[code] * absmax of its block, rounded to dtype, in the shape of codes."""
    return cast(Tensor, _dequantize_8bit(codes, absmax, blocksize, signed, dtype))


@python_errors
def dequantize_8bit_out(
    codes: Tensor, absmax: Tensor, out: Tensor, blocksize: int = 256, signed: bool = True
) -> None:
    """dequantize_8bit into out, which has the shape of codes."""
    _dequantize_8bit_out(codes, absmax, blocksize, signed, out=out)


@python_errors
def quantize_scales(
    absmax: Tensor, rounding: str = "nearest", offset: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization (QLoRA, section 3): absmax less its mean, to 8 bits in blocks of 256.

    Args:
        absmax: float32 [n_blocks].
        rounding: as in quantize_8bit.
        offset: float32 [1] to subtract instead of the mean. The mean taken here is the exact one
            rounded to float32; bitsandbytes subtracts torch's absmax.mean(), whose last bits
            depend on torch's threads: whoever wants its codes bit for bit passes that.

    Returns:
        absmax_q8 uint8 [n_blocks], nested_absmax float32 [ceil(n_blocks/256)] and nested_offset
        float32 [1], what was subtracted.
    """
    return cast(tuple[Tensor, Tensor, Tensor], _quantize_scales(absmax, rounding, offset))


@python_errors
def dequantize_scales(absmax_q8: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    """The absmax values, float32 [n_blocks], that quantize_scales made codes of."""
    return cast(Tensor, _dequantize_scales(absmax_q8, nested_absmax, nested_offset))
