"""`torch.ops.bitsandbytes.*`: the 4-bit and 8-bit blockwise ops under bitsandbytes' schemas.

transformers, peft and accelerate call none of them; programs that compile or export bitsandbytes'
layers do. They are defined when the package is put in bitsandbytes' place, as two libraries cannot
define one op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_native import ops
from qlora_native.bitsandbytes import functional
from qlora_native.bitsandbytes.quant_state import QuantState

_new_library: Any = torch.library.Library
_library: Any = None
_TABLE: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {}


def define() -> None:
    """Define the ops in torch's registry, once."""
    global _library
    if _library is not None:
        return
    _library = _new_library("bitsandbytes", "DEF")
    for name, (schema, kernel, fake) in _TABLE.items():
        _library.define(name + schema)
        _library.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"bitsandbytes::{name}", fake, lib=_library)


def _op(name: str, schema: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    def enter(kernel: Callable[..., Any]) -> Callable[..., Any]:
        _TABLE[name] = (schema, kernel, fake)
        return kernel

    return enter


def _write(out: Tensor, values: Tensor) -> None:
    if out.shape != values.shape or out.dtype != values.dtype:
        raise ValueError(
            f"out must be {values.dtype} of shape {list(values.shape)}, got {out.dtype} of shape "
            f"{list(out.shape)}"
        )
    out.copy_(values)


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


# ---- 4 bits --------------------------------------------------------------------------------------


def _quantize_4bit_fake(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    packed = A.new_empty((A.numel() + 1) // (2 * quant_storage.itemsize), 1, dtype=quant_storage)
    return packed, A.new_empty(-(-A.numel() // blocksize), dtype=torch.float32)


@_op(
    "quantize_4bit",
    "(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
    _quantize_4bit_fake,
)
def _quantize_4bit(
    A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[Tensor, Tensor]:
    packed, state = functional.quantize_4bit(
        A, blocksize=blocksize, quant_type=quant_type, quant_storage=quant_storage
    )
    return packed, state.absmax


def _dequantize_4bit_fake(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return A.new_empty(shape, dtype=dtype)


_DEQUANTIZE_4BIT = (
    "(Tensor A, Tensor absmax, int blocksize, str quant_type, SymInt[] shape, ScalarType dtype"
)


@_op("dequantize_4bit", _DEQUANTIZE_4BIT + ") -> Tensor", _dequantize_4bit_fake)
def _dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return ops.dequantize_4bit(
        functional.bytes_of(A), absmax.float(), None, None, shape, blocksize, quant_type, dtype
    )


@_op("dequantize_4bit.out", _DEQUANTIZE_4BIT + ", Tensor(a!) out) -> ()", _nothing)
def _dequantize_4bit_out(*args: Any, out: Tensor | None = None) -> None:
    *args_, out = (*args, out) if out is not None else args
    _write(out, _dequantize_4bit(*args_))


def _product_fake(A: Tensor, B: Tensor, shapeB: Sequence[int], *rest: Any, **more: Any) -> Tensor:
    return A.new_empty((*A.shape[:-1], shapeB[0]))


@_op(
    "gemm_4bit",
    "(Tensor A, Tensor B, SymInt[] shapeB, Tensor absmax, int blocksize, str quant_type, "
    "Tensor? bias=None, Tensor? absmax_8bit=None, Tensor? absmax_code=None, "
    "Tensor? absmax_offset=None) -> Tensor",
    _product_fake,
)
def _gemm_4bit(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    state2 = None
    if absmax_8bit is not None:
        state2 = QuantState(absmax, code=absmax_code, blocksize=256, dtype=torch.float32)
    scales = absmax if absmax_8bit is None else absmax_8bit
    state = QuantState(scales, offset=absmax_offset, state2=state2)
    packed = functional.bytes_of(B)
    return ops.linear_4bit(A, packed, *state.scales(), shapeB[0], blocksize, quant_type, bias)


_GEMV_4BIT = "(Tensor A, Tensor B, SymInt[] shapeB, Tensor absmax, Tensor code, int blocksize"


@_op("gemv_4bit", _GEMV_4BIT + ") -> Tensor", _product_fake)
def _gemv_4bit(
    A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int
) -> Tensor:
    quant_type = "fp4" if code[1] > 0 else "nf4"
    packed = functional.bytes_of(B)
    return ops.linear_4bit(A, packed, absmax.float(), None, None, shapeB[0], blocksize, quant_type)


@_op("gemv_4bit.out", _GEMV_4BIT + ", Tensor(a!) out) -> ()", _nothing)
def _gemv_4bit_out(*args: Any, out: Tensor | None = None) -> None:
    *args_, out = (*args, out) if out is not None else args
    _write(out, _gemv_4bit(*args_))


# ---- 8 bits --------------------------------------------------------------------------------------


def _quantize_blockwise_fake(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    absmax = A.new_empty(-(-A.numel() // blocksize), dtype=torch.float32)
    return torch.empty_like(A, dtype=torch.uint8), absmax


@_op(
    "quantize_blockwise",
    "(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)",
    _quantize_blockwise_fake,
)
def _quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    codes, state = functional.quantize_blockwise(A, code, blocksize=blocksize)
    return codes, state.absmax


def _dequantize_blockwise_fake(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
) -> Tensor:
    return torch.empty_like(A, dtype=dtype)


_DEQUANTIZE_BLOCKWISE = "(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype"


@_op("dequantize_blockwise", _DEQUANTIZE_BLOCKWISE + ") -> Tensor", _dequantize_blockwise_fake)
def _dequantize_blockwise(
    A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype
) -> Tensor:
    state = QuantState(absmax, code=code, blocksize=blocksize, dtype=dtype)
    return functional.dequantize_blockwise(A, state)


@_op("dequantize_blockwise.out", _DEQUANTIZE_BLOCKWISE + ", Tensor(a!) out) -> ()", _nothing)
def _dequantize_blockwise_out(*args: Any, out: Tensor | None = None) -> None:
    *args_, out = (*args, out) if out is not None else args
    _write(out, _dequantize_blockwise(*args_))
