"""bitsandbytes.functional over our ops: 4-bit and 8-bit blockwise quantization.

On a CPU the scales' codes are the ones that bitsandbytes gives there, bit for bit; on CUDA its
rule there, the exact nearest, is ours too (docs/numerics.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_native import functional as native
from qlora_native import ops
from qlora_native.bitsandbytes import quant_state as states
from qlora_native.bitsandbytes._missing import LLM_INT8, attributes, refuse
from qlora_native.bitsandbytes.maps import (
    create_dynamic_map,
    dynamic_map,
    get_4bit_type,
    sign_of,
)
from qlora_native.bitsandbytes.quant_state import QuantState
from qlora_native.quant_state import BLOCKSIZES, FORMATS, NESTED_BLOCKSIZE, WEIGHT_DTYPES

__all__ = [
    "QuantState",
    "create_dynamic_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "get_4bit_type",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
]

_OTHER_MAPS = "only the dynamic maps and NF4 and FP4 have kernels"
_OPTIMIZER = "the optimizers' steps are ops of many tensors, in qlora_native.ops"
_PAGES = "paged memory is qlora_native._core.PagedBuffer; the paged optimizers use it"

__getattr__ = attributes(
    __name__,
    {
        **dict.fromkeys(
            ("batched_igemm", "igemm", "int8_double_quant", "int8_linear_matmul",
             "int8_mm_dequant", "int8_vectorwise_dequant", "int8_vectorwise_quant", "spmm_coo"),
            LLM_INT8,
        ),
        **dict.fromkeys(("create_fp8_map", "create_linear_map", "create_normal_map"), _OTHER_MAPS),
        **dict.fromkeys(
            ("optimizer_update_32bit", "optimizer_update_8bit_blockwise"), _OPTIMIZER
        ),
        **dict.fromkeys(("GlobalPageManager", "get_paged", "prefetch_tensor"), _PAGES),
    },
)  # fmt: skip


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Quantize A to 4 bits in blocks that share a scale (QLoRA, section 3).

    Args:
        A: any shape, n values, float32, float16 or bfloat16.
        absmax: where the scales are written, the codes of them with compress_statistics.
        out: where the codes are written.
        blocksize: 64 where None; a power of two, 32 to 4096.
        compress_statistics: quantize the scales too.
        quant_type: "nf4" or "fp4".
        quant_storage: dtype that the bytes of the codes are seen as.

    Returns:
        the codes [ceil(n/2) bytes, 1], two a byte, the first one high; and what undoes it.

    Raises:
        ValueError: a bad argument; Inf or NaN in A with compress_statistics.
    """
    _check_4bit(blocksize := 64 if blocksize is None else blocksize, quant_type, A.dtype, "A")
    packed, state = native.quantize_4bit(
        A.detach(),
        blocksize,
        quant_type,
        compress_statistics,
        scale_rounding=_rounding(A),
        name="A",
    )
    if packed.numel() % quant_storage.itemsize:
        raise ValueError(
            f"quant_storage {quant_storage} must divide the {packed.numel()} bytes that shape "
            f"{list(A.shape)} takes: pass torch.uint8"
        )
    if quant_storage != torch.uint8:
        packed = packed.view(-1).view(quant_storage).view(-1, 1)
    theirs = with_maps(state)
    if absmax is not None:
        theirs.absmax = absmax.copy_(theirs.absmax)
    return packed if out is None else out.copy_(packed), theirs


def with_maps(state: native.QuantState) -> QuantState:
    """Our state as bitsandbytes' one, on the same tensors."""
    offset = state2 = None
    if state.nested_absmax is not None and state.nested_offset is not None:
        offset = state.nested_offset.reshape(())
        state2 = QuantState(
            absmax=state.nested_absmax,
            code=dynamic_map(True, state.device),
            blocksize=NESTED_BLOCKSIZE,
            dtype=torch.float32,
        )
    return QuantState(
        absmax=state.absmax,
        shape=state.shape,
        code=get_4bit_type(state.format, state.device),
        blocksize=state.blocksize,
        quant_type=state.format,
        dtype=state.dtype,
        offset=offset,
        state2=state2,
    )


def quantize_fp4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """quantize_4bit to FP4."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def quantize_nf4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """quantize_4bit to NF4."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """The values that the codes A stand for.

    Args:
        A: what quantize_4bit gave. Of shape [1, bytes] the result is transposed, which early
            versions of bitsandbytes stored weights for.
        quant_state: the same's. Without it absmax, out, blocksize and quant_type say the rest.
        out: of the state's shape and dtype, filled and returned.

    Raises:
        ValueError: a bad argument, or A has not the bytes that the shape needs.
    """
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("quant_state must be given, or both absmax and out")
        quant_state = QuantState(
            absmax=absmax,
            shape=out.shape,
            dtype=out.dtype,
            blocksize=64 if blocksize is None else blocksize,
            quant_type=quant_type,
        )
    _check_4bit(quant_state.blocksize, quant_state.quant_type, quant_state.dtype, "quant_state")
    packed = bytes_of(A)
    if out is None:
        values = ops.dequantize_4bit(
            packed,
            *quant_state.scales(),
            quant_state.shape,
            quant_state.blocksize,
            quant_state.quant_type,
            quant_state.dtype,
        )
    else:
        if out.shape != quant_state.shape or out.dtype != quant_state.dtype:
            raise ValueError(
                f"out must be {quant_state.dtype} of shape {list(quant_state.shape)}, as "
                f"quant_state says, got {out.dtype} of shape {list(out.shape)}"
            )
        ops.dequantize_4bit_out(
            packed, *quant_state.scales(), out, quant_state.blocksize, quant_state.quant_type
        )
        values = out
    is_row = A.dim() == 2 and A.shape[0] == 1 and A.shape[1] > 1
    return values.t() if is_row else values


def dequantize_fp4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """dequantize_4bit from FP4."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def dequantize_nf4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """dequantize_4bit from NF4."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """Quantize A to 8 bits in blocks (8-bit Optimizers, section 2.1).

    Args:
        A: any shape, float32, float16 or bfloat16.
        code: the map, create_dynamic_map(signed=True) where None; or that with signed=False.
        absmax, out: where the scales and the codes are written.
        blocksize: a power of two, 32 to 4096.
        nested: quantize the scales, less their mean, in the same way.

    Returns:
        codes uint8 in A's shape, and what undoes it.

    Raises:
        ValueError: a bad argument.
        NotImplementedError: code is another map.
    """
    _check_blocksize(blocksize)
    _check_dtype(A.dtype, "A")
    code = dynamic_map(True, A.device) if code is None else code
    signed = sign_of(code)
    if signed is None:
        refuse("quantization to other 8-bit maps (code)", _OTHER_MAPS)
    codes, scales = ops.quantize_8bit(A.detach(), blocksize, signed, _rounding(A))
    state = QuantState(scales, code=code.to(A.device), blocksize=blocksize, dtype=A.dtype)
    if nested:
        state.offset = scales.mean()
        state.absmax, state.state2 = quantize_blockwise(scales - state.offset, blocksize=blocksize)
    if absmax is not None:
        state.absmax = absmax.copy_(state.absmax)
    return codes if out is None else out.copy_(codes), state


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """The values of quantize_blockwise's codes, in their shape and in the state's dtype.

    Args:
        A: codes, uint8.
        quant_state: quantize_blockwise's; or absmax, code and blocksize for float32 values.
        code: any map of 256 values.
        out: filled and returned.
        nested: without effect, as in bitsandbytes: the state says it.
    """
    if quant_state is None:
        if absmax is None:
            raise ValueError("quant_state or absmax must be given")
        code = dynamic_map(True, A.device) if code is None else code
        quant_state = QuantState(absmax, code=code, blocksize=blocksize, dtype=torch.float32)
    if A.dtype != torch.uint8:
        raise ValueError(f"A must be uint8, got {A.dtype}")
    _check_blocksize(quant_state.blocksize)
    scales = quant_state.absmax
    if quant_state.state2 is not None and quant_state.offset is not None:
        scales = dequantize_blockwise(scales, quant_state.state2).float() + quant_state.offset
    values = states.dequantize_8bit(
        A, scales, quant_state.code.to(A.device), quant_state.blocksize, quant_state.dtype
    )
    return values if out is None else out.copy_(values)


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """A W^T with W [N, K] read as 4-bit. Not differentiable: matmul_4bit is.

    Args:
        A: [..., K].
        B, state: quantize_4bit's of W.
        transposed_A, transposed_B: without effect, as in bitsandbytes.
    """
    if state is None:
        raise ValueError("state must be given: quantize_4bit returns it")
    values = ops.linear_4bit(
        A.detach(), bytes_of(B), *state.scales(), state.shape[0], state.blocksize, state.quant_type
    )
    return values if out is None else out.copy_(values)


def bytes_of(packed: Tensor) -> Tensor:
    """4-bit codes as the bytes they are, whatever dtype they are stored as."""
    packed = packed.detach()
    return packed if packed.dtype == torch.uint8 else packed.contiguous().view(torch.uint8)


def _rounding(x: Tensor) -> str:
    return "bitsandbytes_cpu" if x.device.type == "cpu" else "nearest"


def _check_4bit(blocksize: int, quant_type: str, dtype: torch.dtype, name: str) -> None:
    _check_blocksize(blocksize)
    if quant_type not in FORMATS:
        raise ValueError(f"quant_type must be one of {FORMATS}, got {quant_type!r}")
    _check_dtype(dtype, name)


def _check_blocksize(blocksize: int) -> None:
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {blocksize}")


def _check_dtype(dtype: torch.dtype, name: str) -> None:
    if dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{name} must have dtype one of {WEIGHT_DTYPES}, got {dtype}")
