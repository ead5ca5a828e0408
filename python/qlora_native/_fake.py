"""The ops on fake tensors, for torch.compile: shapes and dtypes, nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from qlora_native import _load as _load

NESTED_BLOCKSIZE = 256

F = TypeVar("F", bound=Callable[..., Any])


def _fake(op: str) -> Callable[[F], F]:
    return cast(Callable[[F], F], torch.library.register_fake(f"qlora_native::{op}"))


def _ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def _with_last(x: Tensor, size: int, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], size), dtype=dtype or x.dtype)


@_fake("quantize_4bit")
def _quantize_4bit(x: Tensor, blocksize: int, format: str) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(_ceil_div(x.numel(), 2), dtype=torch.uint8),
        x.new_empty(_ceil_div(x.numel(), blocksize), dtype=torch.float32),
    )


@_fake("dequantize_4bit")
def _dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
    format: str,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(tuple(shape), dtype=dtype)


@_fake("quantize_8bit")
def _quantize_8bit(x: Tensor, blocksize: int, signed: bool, rounding: str) -> tuple[Tensor, Tensor]:
    return (
        x.new_empty(x.shape, dtype=torch.uint8),
        x.new_empty(_ceil_div(x.numel(), blocksize), dtype=torch.float32),
    )


@_fake("dequantize_8bit")
def _dequantize_8bit(
    codes: Tensor, absmax: Tensor, blocksize: int, signed: bool, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


@_fake("quantize_scales")
def _quantize_scales(
    absmax: Tensor, rounding: str, offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        absmax.new_empty(absmax.numel(), dtype=torch.uint8),
        absmax.new_empty(_ceil_div(absmax.numel(), NESTED_BLOCKSIZE)),
        absmax.new_empty(1),
    )


@_fake("dequantize_scales")
def _dequantize_scales(absmax_q8: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> Tensor:
    return absmax_q8.new_empty(absmax_q8.numel(), dtype=torch.float32)


@_fake("linear_4bit")
def _linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    out_features: int,
    blocksize: int,
    format: str,
    bias: Tensor | None,
) -> Tensor:
    return _with_last(x, out_features)


@_fake("linear_4bit_backward_input")
def _linear_4bit_backward_input(
    grad_out: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    in_features: int,
    blocksize: int,
    format: str,
) -> Tensor:
    return _with_last(grad_out, in_features)


@_fake("qlora_linear")
def _qlora_linear(
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
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    return _with_last(x, lora_b.shape[0]), _with_last(x, lora_a.shape[0], torch.float32)


@_fake("qlora_linear_backward")
def _qlora_linear_backward(
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
    dropout_p: float,
    dropout_seed: Tensor | None,
    need_grad_x: bool,
    need_grad_a: bool,
    need_grad_b: bool,
    need_grad_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_grad_x else (0,)),
        lora_a.new_empty(lora_a.shape if need_grad_a else (0,)),
        lora_b.new_empty(lora_b.shape if need_grad_b else (0,)),
        x.new_empty((lora_b.shape[0],) if need_grad_bias else (0,)),
    )


@_fake("grouped_linear_4bit")
def _grouped_linear_4bit(
    x: Tensor,
    offsets: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    out_features: int,
    blocksize: int,
    format: str,
) -> Tensor:
    return _with_last(x, out_features)


@_fake("grouped_linear_4bit_backward_input")
def _grouped_linear_4bit_backward_input(
    grad_out: Tensor,
    offsets: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    in_features: int,
    blocksize: int,
    format: str,
) -> Tensor:
    return _with_last(grad_out, in_features)


# These write into their arguments and return nothing.
for _op in (
    "quantize_4bit.out",
    "dequantize_4bit.out",
    "quantize_8bit.out",
    "dequantize_8bit.out",
    "linear_4bit.out",
    "adamw_step",
    "adamw_8bit_step",
    "lion_step",
    "lion_8bit_step",
    "sgd_step",
    "sgd_8bit_step",
):
    _fake(_op)(lambda *args, **kwargs: None)
