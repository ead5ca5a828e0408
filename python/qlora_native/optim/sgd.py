"""SGD with momentum, with 32-bit and with 8-bit state, in torch.optim.SGD's order of operations.

One moment, 4 bytes a value in fp32, 1.02 in 8 bits. Without momentum there is no state to make
smaller: that is torch.optim.SGD, and refused here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from qlora_native import ops
from qlora_native.optim.native import NativeOptimizer, refuse


class _SGDRule(NativeOptimizer):
    moments = ("momentum_buffer",)
    step_op = staticmethod(ops.sgd_step)
    step_8bit_op = staticmethod(ops.sgd_8bit_step)

    @staticmethod
    def _check_rule(group: dict[str, Any]) -> None:
        momentum, dampening = float(group["momentum"]), float(group["dampening"])
        if not 0.0 < momentum < float("inf"):
            raise ValueError(
                f"momentum must be finite and more than 0, got {momentum}: torch.optim.SGD keeps "
                "no state without it"
            )
        if not 0.0 <= dampening < 1.0:
            raise ValueError(f"dampening must be in [0, 1), got {dampening}")
        if group["nesterov"] and dampening != 0.0:
            raise ValueError(f"dampening must be 0 with nesterov, got {dampening}")

    @staticmethod
    def _progress(state: dict[str, Any], is_new: bool) -> int:
        return int(is_new)

    @staticmethod
    def _arguments(group: dict[str, Any], progress: int) -> dict[str, Any]:
        return {
            "momentum": float(group["momentum"]),
            "dampening": float(group["dampening"]),
            "nesterov": bool(group["nesterov"]),
            "first_step": progress == 1,
        }


class SGD(_SGDRule):
    """SGD with momentum and 32-bit state.

    Takes the arguments of torch.optim.SGD and loads its state_dict, as torch loads ours.

    Args:
        params: dense, contiguous float32, float16 or bfloat16 parameters, or dicts of groups.
        lr, dampening, weight_decay, nesterov, maximize: as in torch, for each group too.
        momentum: more than 0.
        foreach, fused: taken and without effect; a step is always one call for all tensors.
        differentiable: refused where True.

    GradScaler hands its scale to the step, which divides by it; gradients are left scaled.

    Raises:
        ValueError: a setting is out of its range, or a parameter is sparse or not contiguous.
        TypeError: a parameter has another dtype.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        refuse(differentiable=differentiable)
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "maximize": maximize,
            },
        )


class SGD8bit(_SGDRule):
    """SGD with momentum and 8-bit state; tensors of fewer than `min_8bit_size` values keep 32 bits.

    The arguments of SGD, and min_8bit_size, which bitsandbytes names and sets likewise.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        min_8bit_size: int = 4096,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        refuse(differentiable=differentiable)
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
                "maximize": maximize,
                "min_8bit_size": min_8bit_size,
            },
        )
