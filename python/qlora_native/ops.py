"""The ops: typed wrappers over `torch.ops.qlora_native.*`, one each, in the order of the schemas.

Names of sizes: M tokens (the product of x's leading dimensions), N out_features, K in_features,
R LoRA rank, n values, n_blocks = ceil(n / blocksize).

A 4-bit weight [N, K] travels as its parts:

    packed         uint8, ceil(N*K/2) bytes in any shape; two codes a byte, the first one high
    absmax         float32 [n_blocks]; uint8 [n_blocks] where the scales are double-quantized, with
    nested_absmax  float32 [ceil(n_blocks/256)], else None
    nested_offset  float32, one value, else None

blocksize is a power of two from 32 to 4096; format is "nf4" or "fp4"; floating tensors are float32,
float16 or bfloat16. Inputs that are not contiguous are copied; outputs must be contiguous and must
not share memory with inputs. Every size may be 0.

All of them raise ValueError for a wrong value, shape or device, TypeError for a wrong dtype or type
(each message names the argument, what is wanted and what came), NotImplementedError for a device
without kernels, and RuntimeError where the kernel itself fails. The sources are in cpp/torch
(checks), cpp/cpu (kernels).
"""

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
_linear_4bit = _ops.linear_4bit.default
_linear_4bit_out = _ops.linear_4bit.out
_linear_4bit_backward_input = _ops.linear_4bit_backward_input.default
_qlora_linear = _ops.qlora_linear.default
_qlora_linear_backward = _ops.qlora_linear_backward.default
_adamw_step = _ops.adamw_step.default
_adamw_8bit_step = _ops.adamw_8bit_step.default


# ---- quantization -------------------------------------------------------------------------------


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


# ---- linear -------------------------------------------------------------------------------------


@python_errors
def linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    out_features: int,
    blocksize: int = 64,
    format: str = "nf4",
    bias: Tensor | None = None,
) -> Tensor:
    """y = x W^T + bias, with W [N, K] read as 4-bit. Differentiable in x and bias.

    Args:
        x: [..., K], floating.
        out_features: N.
        bias: [N], of x's dtype.

    Returns:
        [..., N], of x's dtype; sums are accumulated in float32.
    """
    return cast(
        Tensor,
        _linear_4bit(
            x, packed, absmax, nested_absmax, nested_offset, out_features, blocksize, format, bias
        ),
    )


@python_errors
def linear_4bit_out(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    out: Tensor,
    blocksize: int = 64,
    format: str = "nf4",
    bias: Tensor | None = None,
) -> None:
    """linear_4bit into out [..., N], of x's dtype. Not differentiable.

    Raises:
        RuntimeError: x, bias or out requires a gradient while grad mode is on.
    """
    if torch.is_grad_enabled():
        for name, tensor in (("x", x), ("bias", bias), ("out", out)):
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"linear_4bit_out is not differentiable, and {name} requires a gradient: call "
                    "linear_4bit, or enter torch.no_grad()"
                )
    _linear_4bit_out(
        x, packed, absmax, nested_absmax, nested_offset, blocksize, format, bias, out=out
    )


@python_errors
def linear_4bit_backward_input(
    grad_out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    in_features: int,
    blocksize: int = 64,
    format: str = "nf4",
) -> Tensor:
    """grad_x = grad_out W, the gradient of linear_4bit for its input.

    Args:
        grad_out: [..., N], floating.
        in_features: K.

    Returns:
        [..., K], of grad_out's dtype.
    """
    return cast(
        Tensor,
        _linear_4bit_backward_input(
            grad_out, packed, absmax, nested_absmax, nested_offset, in_features, blocksize, format
        ),
    )


@python_errors
def qlora_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    format: str,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    lora_scale: float,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = x W^T + bias + lora_scale * u B^T with u = drop(x) A^T, in one pass over x.

    Differentiable, once, in x, bias, lora_a and lora_b; the frozen weight gets no gradient, and u
    is there for the backward pass, not to be differentiated.

    Args:
        x: [..., K], floating.
        bias: [N], of x's dtype.
        lora_a: [R, K], floating, of a dtype of its own.
        lora_b: [N, R], of lora_a's dtype.
        lora_scale: alpha / R, or alpha / sqrt(R) for rsLoRA.
        dropout_p: in [0, 1), the share of drop(x) that is zeroed.
        dropout_seed: int64, one value; the mask is a function of it, the row and the column.
            Needed where dropout_p is not 0.

    Returns:
        y [..., N] of x's dtype and u [..., R] float32.
    """
    return cast(
        tuple[Tensor, Tensor],
        _qlora_linear(
            x, packed, absmax, nested_absmax, nested_offset, blocksize, format, bias,
            lora_a, lora_b, lora_scale, dropout_p, dropout_seed,
        ),
    )  # fmt: skip


@python_errors
def qlora_linear_backward(
    grad_out: Tensor,
    x: Tensor,
    u: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    blocksize: int,
    format: str,
    lora_a: Tensor,
    lora_b: Tensor,
    lora_scale: float,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    need_grad_x: bool = True,
    need_grad_a: bool = True,
    need_grad_b: bool = True,
    need_grad_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of qlora_linear, given grad_out [..., N] and the forward pass's x and u.

    Returns:
        grad_x [..., K] and grad_bias [N] of x's dtype, grad_a [R, K] and grad_b [N, R] of lora_a's
        (in the order x, a, b, bias). One that is not needed is an empty tensor.
    """
    return cast(
        tuple[Tensor, Tensor, Tensor, Tensor],
        _qlora_linear_backward(
            grad_out, x, u, packed, absmax, nested_absmax, nested_offset, blocksize, format,
            lora_a, lora_b, lora_scale, dropout_p, dropout_seed,
            need_grad_x, need_grad_a, need_grad_b, need_grad_bias,
        ),
    )  # fmt: skip


# ---- optimizer ----------------------------------------------------------------------------------


@python_errors
def adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One AdamW step on many tensors, in place, in torch.optim.AdamW's order of operations.

    Args:
        params, grads: floating, of equal shapes; their dtypes may differ.
        exp_avg, exp_avg_sq: float32, of params' shapes.
        step: 1 in the first call.
        grad_scale: float32, one value that gradients are divided by (GradScaler).
        found_inf: float32, one value; not 0 skips the whole step.
    """
    if not params:
        return
    _adamw_step(
        params, grads, exp_avg, exp_avg_sq, lr, beta1, beta2, eps, weight_decay, step, maximize,
        grad_scale, found_inf,
    )  # fmt: skip


@python_errors
def adamw_8bit_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    exp_avg_absmax: Sequence[Tensor],
    exp_avg_sq_absmax: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """adamw_step with 8-bit blockwise state (8-bit Optimizers, section 2), blocks of 256 values.

    Args:
        exp_avg: uint8 codes of the signed dynamic map, in params' shapes.
        exp_avg_sq: uint8 codes of the unsigned one.
        exp_avg_absmax, exp_avg_sq_absmax: float32 [ceil(n/256)] each.
    """
    if not params:
        return
    _adamw_8bit_step(
        params, grads, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, lr, beta1, beta2,
        eps, weight_decay, step, maximize, grad_scale, found_inf,
    )  # fmt: skip
