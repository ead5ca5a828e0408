"""The gradients of the linear ops, registered with torch, so that the ops themselves differentiate.

linear_4bit is linear in x, so its input gradient is differentiable again (it is linear_4bit).
qlora_linear differentiates once: a second derivative is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qlora_native import _load as _load

_ops: Any = torch.ops.qlora_native
_linear_4bit = _ops.linear_4bit.default
_linear_4bit_backward_input = _ops.linear_4bit_backward_input.default
_qlora_linear_backward = _ops.qlora_linear_backward.default


# ---- linear_4bit --------------------------------------------------------------------------------


def _linear_4bit_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, absmax, nested_absmax, nested_offset, _, blocksize, format, _ = inputs
    ctx.save_for_backward(packed, absmax, nested_absmax, nested_offset)
    ctx.in_features = x.shape[-1]
    ctx.blocksize = blocksize
    ctx.format = format


def _linear_4bit_grad(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _linear_4bit_backward_input(
            grad_out, *ctx.saved_tensors, ctx.in_features, ctx.blocksize, ctx.format
        )
    if ctx.needs_input_grad[8]:
        grad_bias = grad_out.reshape(-1, grad_out.shape[-1]).sum(0)
    return grad_x, None, None, None, None, None, None, None, grad_bias


def _backward_input_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad_out, packed, absmax, nested_absmax, nested_offset, _, blocksize, format = inputs
    ctx.save_for_backward(packed, absmax, nested_absmax, nested_offset)
    ctx.out_features = grad_out.shape[-1]
    ctx.blocksize = blocksize
    ctx.format = format


def _backward_input_grad(ctx: Any, grad_grad_x: Tensor) -> tuple[Tensor | None, ...]:
    grad_grad_out = _linear_4bit(
        grad_grad_x, *ctx.saved_tensors, ctx.out_features, ctx.blocksize, ctx.format, None
    )
    return grad_grad_out, None, None, None, None, None, None, None


# ---- qlora_linear -------------------------------------------------------------------------------


def _qlora_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    (
        x, packed, absmax, nested_absmax, nested_offset, blocksize, format, _,
        lora_a, lora_b, lora_scale, dropout_p, dropout_seed,
    ) = inputs  # fmt: skip
    ctx.save_for_backward(
        x, output[1], packed, absmax, nested_absmax, nested_offset, lora_a, lora_b, dropout_seed
    )
    ctx.blocksize = blocksize
    ctx.format = format
    ctx.lora_scale = lora_scale
    ctx.dropout_p = dropout_p
    ctx.set_materialize_grads(False)


def _qlora_linear_grad(
    ctx: Any, grad_out: Tensor | None, grad_u: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_u is not None:
        raise RuntimeError(
            "qlora_native::qlora_linear: u is not differentiable; it is returned for the backward "
            "pass alone, and a loss must be computed from the first output"
        )
    if grad_out is None:
        return (None,) * 13
    (
        x, u, packed, absmax, nested_absmax, nested_offset, lora_a, lora_b, dropout_seed,
    ) = ctx.saved_tensors  # fmt: skip
    needs = ctx.needs_input_grad
    needs_x, needs_bias, needs_a, needs_b = needs[0], needs[7], needs[8], needs[9]
    grad_x, grad_a, grad_b, grad_bias = _qlora_linear_backward(
        grad_out, x, u, packed, absmax, nested_absmax, nested_offset, ctx.blocksize, ctx.format,
        lora_a, lora_b, ctx.lora_scale, ctx.dropout_p, dropout_seed,
        needs_x, needs_a, needs_b, needs_bias,
    )  # fmt: skip
    return (
        grad_x if needs_x else None,
        *(None,) * 6,
        grad_bias if needs_bias else None,
        grad_a if needs_a else None,
        grad_b if needs_b else None,
        *(None,) * 3,
    )


def _refuse_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _refuse_grad(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
    raise RuntimeError(
        "qlora_native::qlora_linear: the second derivative is not implemented; "
        "call backward() or grad() without create_graph=True"
    )


def _register() -> None:
    register = torch.library.register_autograd
    register("qlora_native::linear_4bit", _linear_4bit_grad, setup_context=_linear_4bit_setup)
    register(
        "qlora_native::linear_4bit_backward_input",
        _backward_input_grad,
        setup_context=_backward_input_setup,
    )
    register("qlora_native::qlora_linear", _qlora_linear_grad, setup_context=_qlora_linear_setup)
    register("qlora_native::qlora_linear_backward", _refuse_grad, setup_context=_refuse_setup)


_register()
