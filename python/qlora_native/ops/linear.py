"""Linear layers with a frozen 4-bit weight, without and with a LoRA branch, and their gradients."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from qlora_native import _load as _load
from qlora_native._errors import python_errors

_ops: Any = torch.ops.qlora_native
_linear_4bit = _ops.linear_4bit.default
_linear_4bit_out = _ops.linear_4bit.out
_linear_4bit_backward_input = _ops.linear_4bit_backward_input.default
_qlora_linear = _ops.qlora_linear.default
_qlora_linear_backward = _ops.qlora_linear_backward.default


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
