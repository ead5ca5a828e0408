"""The gradients of the linear ops.

They are registered with torch, so that the ops themselves differentiate, under torch.compile too.
For eager code, linear_4bit and qlora_linear here do the same through a torch.autograd.Function, and
go past torch's autograd where nothing is recorded: the registered way takes some 10 us of Python
more in each call without gradient, and some 60 with one, which a small model's step feels. And
torch.func's transforms cannot take the registered way at all.

linear_4bit is linear in x, so its input gradient is differentiable again (it is linear_4bit).
qlora_linear differentiates once: a second derivative is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from qlora_native import _load as _load
from qlora_native._autocast import lowered
from qlora_native._errors import python_errors
from qlora_native._vmap import rule_of

_ops: Any = torch.ops.qlora_native
_linear_4bit = _ops.linear_4bit.default
_linear_4bit_backward_input = _ops.linear_4bit_backward_input.default
_grouped_linear_4bit = _ops.grouped_linear_4bit.default
_grouped_linear_4bit_backward_input = _ops.grouped_linear_4bit_backward_input.default
_qlora_linear = _ops.qlora_linear.default
_qlora_linear_backward = _ops.qlora_linear_backward.default

# What stands before a kernel: autograd and autocast.
_ABOVE_KERNELS: Any = reduce(
    operator.or_,
    (
        torch._C.DispatchKeySet(key)
        for name, key in torch._C.DispatchKey.__members__.items()
        if name.startswith(("Autograd", "Autocast"))
        and name not in ("Autograd", "AutogradFunctionality", "AutogradNestedTensor")
    ),
)
_exclude: Any = torch._C._ExcludeDispatchKeyGuard
_transforming: Any = torch._C._are_functorch_transforms_active


def _straight(op: Any, *args: Any) -> Any:
    """op(*args), straight to its kernel."""
    with _exclude(_ABOVE_KERNELS):
        return op(*args)


def _transformable(
    op: Any, setup: Callable[..., None], grad: Callable[..., tuple[Tensor | None, ...]]
) -> Any:
    """`apply` of a torch.autograd.Function around the op that torch.func's transforms take.

    Those ask for a setup_context, which makes a call 15 us slower.
    """
    name = op._opname

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            return _straight(op, *inputs)

        setup_context = staticmethod(setup)
        backward = staticmethod(grad)
        vmap = staticmethod(rule_of(name, lambda *inputs: apply(*inputs)))

    Function.__name__ = Function.__qualname__ = name
    apply: Any = Function.apply
    return apply


def _call(op: Any, transformable: Callable[..., Any], *args: Any) -> Any:
    """op(*args) in a backward pass, differentiable where grad mode is on."""
    if not torch.is_grad_enabled():
        return _straight(op, *args)
    return transformable(*args) if _transforming() else op(*args)


def _is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode AD sees what is called."""
    return _transforming() or forward_ad._current_level >= 0


def _recorded(
    op: Any, setup: Callable[..., None], grad: Callable[..., tuple[Tensor | None, ...]]
) -> Any:
    """`apply` of a torch.autograd.Function around the op, for eager code."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = _straight(op, *inputs)
            setup(ctx, inputs, output)
            # u of qlora_linear is for the backward pass alone.
            return output[0] if isinstance(output, tuple) else output

        backward = staticmethod(grad)

    Function.__name__ = Function.__qualname__ = op._opname
    return Function.apply


def _output(
    op: Any, transformable: Callable[..., Any], recorded: Any, needs_grad: bool, *args: Any
) -> Tensor:
    """The op's first output, by the way that serves the moment."""
    if torch.compiler.is_compiling():
        output = op(*args)
    elif _is_transformed():
        output = transformable(*args)
    elif needs_grad and torch.is_grad_enabled():
        output = recorded(*args)
    else:
        output = _straight(op, *args)
    return cast(Tensor, output[0] if isinstance(output, tuple) else output)


def _product_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Of linear_4bit and grouped_linear_4bit and of their input gradients."""
    x, *tensors, _, ctx.blocksize, ctx.format = inputs
    ctx.save_for_backward(*tensors)
    ctx.other_features = x.shape[-1]


# ---- linear_4bit ---------------------------------------------------------------------------------


def _linear_4bit_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _product_setup(ctx, inputs[:-1], output)  # the bias is not needed again


def _linear_4bit_grad(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _call(
            _linear_4bit_backward_input, _transformable_linear_4bit_backward_input,
            grad_out, *ctx.saved_tensors, ctx.other_features, ctx.blocksize, ctx.format,
        )  # fmt: skip
    if ctx.needs_input_grad[8]:
        grad_bias = grad_out.reshape(-1, grad_out.shape[-1]).sum(0)
    return grad_x, None, None, None, None, None, None, None, grad_bias


def _backward_input_grad(ctx: Any, grad_grad_x: Tensor) -> tuple[Tensor | None, ...]:
    grad_grad_out = _call(
        _linear_4bit, _transformable_linear_4bit,
        grad_grad_x, *ctx.saved_tensors, ctx.other_features, ctx.blocksize, ctx.format, None,
    )  # fmt: skip
    return grad_grad_out, None, None, None, None, None, None, None


_transformable_linear_4bit = _transformable(_linear_4bit, _linear_4bit_setup, _linear_4bit_grad)
_transformable_linear_4bit_backward_input = _transformable(
    _linear_4bit_backward_input, _product_setup, _backward_input_grad
)


_recorded_linear_4bit = _recorded(_linear_4bit, _linear_4bit_setup, _linear_4bit_grad)


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
    """ops.linear_4bit, with less overhead in eager code. Differentiable in x and bias.

    Under autocast x is cast as nn.Linear's is; bias is cast to x's dtype.
    """
    x = lowered(x)
    bias = None if bias is None else bias.to(x.dtype)
    return _output(
        _linear_4bit, _transformable_linear_4bit, _recorded_linear_4bit,
        x.requires_grad or (bias is not None and bias.requires_grad),
        x, packed, absmax, nested_absmax, nested_offset, out_features, blocksize, format, bias,
    )  # fmt: skip


# ---- grouped_linear_4bit -------------------------------------------------------------------------


def _grouped_grad(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = _call(
        _grouped_linear_4bit_backward_input, _transformable_grouped_linear_4bit_backward_input,
        grad_out, *ctx.saved_tensors, ctx.other_features, ctx.blocksize, ctx.format,
    )  # fmt: skip
    return grad_x, *(None,) * 8


def _grouped_backward_input_grad(ctx: Any, grad_grad_x: Tensor) -> tuple[Tensor | None, ...]:
    grad_grad_out = _call(
        _grouped_linear_4bit, _transformable_grouped_linear_4bit,
        grad_grad_x, *ctx.saved_tensors, ctx.other_features, ctx.blocksize, ctx.format,
    )  # fmt: skip
    return grad_grad_out, *(None,) * 8


_transformable_grouped_linear_4bit = _transformable(
    _grouped_linear_4bit, _product_setup, _grouped_grad
)
_transformable_grouped_linear_4bit_backward_input = _transformable(
    _grouped_linear_4bit_backward_input, _product_setup, _grouped_backward_input_grad
)


_recorded_grouped_linear_4bit = _recorded(_grouped_linear_4bit, _product_setup, _grouped_grad)


@python_errors
def grouped_linear_4bit(
    x: Tensor,
    offsets: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    out_features: int,
    blocksize: int = 64,
    format: str = "nf4",
) -> Tensor:
    """ops.grouped_linear_4bit, with less overhead in eager code. Differentiable in x.

    Under autocast x is cast as nn.Linear's is.
    """
    x = lowered(x)
    return _output(
        _grouped_linear_4bit, _transformable_grouped_linear_4bit, _recorded_grouped_linear_4bit,
        x.requires_grad,
        x, offsets, packed, absmax, nested_absmax, nested_offset, out_features, blocksize, format,
    )  # fmt: skip


# ---- qlora_linear --------------------------------------------------------------------------------


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
    ctx: Any, grad_out: Tensor | None, grad_u: Tensor | None = None
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
    grad_x, grad_a, grad_b, grad_bias = _call(
        _qlora_linear_backward, _transformable_qlora_linear_backward,
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


_transformable_qlora_linear = _transformable(_qlora_linear, _qlora_linear_setup, _qlora_linear_grad)
_transformable_qlora_linear_backward = _transformable(
    _qlora_linear_backward, _refuse_setup, _refuse_grad
)


_recorded_qlora_linear = _recorded(_qlora_linear, _qlora_linear_setup, _qlora_linear_grad)


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
) -> Tensor:
    """The first output of ops.qlora_linear, with less overhead in eager code.

    Differentiable, once, in x, bias, lora_a and lora_b. Under autocast x is cast as nn.Linear's is;
    bias is cast to x's dtype.
    """
    x = lowered(x)
    bias = None if bias is None else bias.to(x.dtype)
    needs_grad = (
        lora_a.requires_grad
        or x.requires_grad
        or lora_b.requires_grad
        or (bias is not None and bias.requires_grad)
    )
    return _output(
        _qlora_linear, _transformable_qlora_linear, _recorded_qlora_linear, needs_grad,
        x, packed, absmax, nested_absmax, nested_offset, blocksize, format, bias,
        lora_a, lora_b, lora_scale, dropout_p, dropout_seed,
    )  # fmt: skip


# ---- registration --------------------------------------------------------------------------------


def _register() -> None:
    register = torch.library.register_autograd
    register("qlora_native::linear_4bit", _linear_4bit_grad, setup_context=_linear_4bit_setup)
    register(
        "qlora_native::linear_4bit_backward_input",
        _backward_input_grad,
        setup_context=_product_setup,
    )
    register("qlora_native::grouped_linear_4bit", _grouped_grad, setup_context=_product_setup)
    register(
        "qlora_native::grouped_linear_4bit_backward_input",
        _grouped_backward_input_grad,
        setup_context=_product_setup,
    )
    register("qlora_native::qlora_linear", _qlora_linear_grad, setup_context=_qlora_linear_setup)
    register("qlora_native::qlora_linear_backward", _refuse_grad, setup_context=_refuse_setup)


_register()
