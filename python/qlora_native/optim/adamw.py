"""AdamW with 32-bit and with 8-bit state (Loshchilov & Hutter, 2019).

Both follow torch.optim.AdamW's formula and order of operations (decoupled weight decay, bias
correction) in fp32 arithmetic, whatever dtype the parameters have. AdamW keeps two fp32 moments,
8 bytes a value; AdamW8bit 2.03 bytes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from qlora_native import ops
from qlora_native.optim.native import NativeOptimizer, check_betas, check_not_negative, refuse


class _AdamWRule(NativeOptimizer):
    moments = ("exp_avg", "exp_avg_sq")
    counters = ("step",)
    step_op = staticmethod(ops.adamw_step)
    step_8bit_op = staticmethod(ops.adamw_8bit_step)

    @staticmethod
    def _check_rule(group: dict[str, Any]) -> None:
        refuse(amsgrad=group.get("amsgrad", False))  # of a state_dict
        check_not_negative(group, "eps")
        check_betas(group)

    @staticmethod
    def _progress(state: dict[str, Any], is_new: bool) -> int:
        return int(state["step"]) + 1

    @staticmethod
    def _arguments(group: dict[str, Any], progress: int) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {
            "beta1": float(beta1),
            "beta2": float(beta2),
            "eps": float(group["eps"]),
            "step": progress,
        }


class AdamW(_AdamWRule):
    """AdamW with 32-bit state (Loshchilov & Hutter, 2019).

    Takes the arguments of torch.optim.AdamW and loads its state_dict, as torch loads ours.

    Args:
        params: dense, contiguous float32, float16 or bfloat16 parameters, or dicts of groups.
        lr, betas, eps, weight_decay, maximize: as in torch, for each group too.
        foreach, fused: taken and without effect; a step is always one call for all tensors.
        amsgrad, capturable, differentiable: refused where True.

    GradScaler hands its scale to the step, which divides by it; gradients are left scaled.

    Raises:
        ValueError: a setting is out of its range, or a parameter is sparse or not contiguous.
        TypeError: a parameter has another dtype.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        refuse(amsgrad=amsgrad, capturable=capturable, differentiable=differentiable)
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
            },
        )


class AdamW8bit(_AdamWRule):
    """AdamW with 8-bit blockwise state; tensors of fewer than `min_8bit_size` values keep 32 bits.

    The arguments of AdamW, and min_8bit_size, which bitsandbytes names and sets likewise. Each
    moment is encoded to the nearest code of its dynamic map, by its block's largest magnitude;
    a parameter moves by its moments as they are before that.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        min_8bit_size: int = 4096,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        refuse(amsgrad=amsgrad, capturable=capturable, differentiable=differentiable)
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "min_8bit_size": min_8bit_size,
            },
        )
