"""The optimizers' steps: many tensors in one call, parameters and state written in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_native import _load as _load
from qlora_native._errors import python_errors

_ops: Any = torch.ops.qlora_native
_adamw_step = _ops.adamw_step.default
_adamw_8bit_step = _ops.adamw_8bit_step.default
_lion_step = _ops.lion_step.default
_lion_8bit_step = _ops.lion_8bit_step.default
_sgd_step = _ops.sgd_step.default
_sgd_8bit_step = _ops.sgd_8bit_step.default


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


@python_errors
def lion_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One Lion step on many tensors, in place (Chen et al., 2023, algorithm 2).

    Args:
        params, grads, grad_scale, found_inf: as adamw_step has them.
        exp_avg: float32, of params' shapes.
    """
    if not params:
        return
    _lion_step(
        params, grads, exp_avg, lr, beta1, beta2, weight_decay, maximize, grad_scale, found_inf
    )


@python_errors
def lion_8bit_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_absmax: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """lion_step with 8-bit blockwise state, blocks of 256 values.

    Args:
        exp_avg: uint8 codes of the signed dynamic map, in params' shapes.
        exp_avg_absmax: float32 [ceil(n/256)] each.
    """
    if not params:
        return
    _lion_8bit_step(
        params, grads, exp_avg, exp_avg_absmax, lr, beta1, beta2, weight_decay, maximize,
        grad_scale, found_inf,
    )  # fmt: skip


@python_errors
def sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffer: Sequence[Tensor],
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool = False,
    first_step: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of SGD with momentum on many tensors, in place, in torch.optim.SGD's order.

    Args:
        params, grads, grad_scale, found_inf: as adamw_step has them.
        momentum_buffer: float32, of params' shapes.
        weight_decay: coupled, that is added to the gradient.
        first_step: the buffer begins as the gradient, un-dampened, whatever it holds.
    """
    if not params:
        return
    _sgd_step(
        params, grads, momentum_buffer, lr, momentum, dampening, weight_decay, nesterov, first_step,
        maximize, grad_scale, found_inf,
    )  # fmt: skip


@python_errors
def sgd_8bit_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffer: Sequence[Tensor],
    momentum_buffer_absmax: Sequence[Tensor],
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool = False,
    first_step: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """sgd_step with 8-bit blockwise state, blocks of 256 values.

    Args:
        momentum_buffer: uint8 codes of the signed dynamic map, in params' shapes.
        momentum_buffer_absmax: float32 [ceil(n/256)] each.
    """
    if not params:
        return
    _sgd_8bit_step(
        params, grads, momentum_buffer, momentum_buffer_absmax, lr, momentum, dampening,
        weight_decay, nesterov, first_step, maximize, grad_scale, found_inf,
    )  # fmt: skip
