"""Lion with 32-bit and with 8-bit state (Chen et al., 2023, algorithm 2).

"Symbolic Discovery of Optimization Algorithms": each value moves by lr, by the sign of a mean of
its momentum and its gradient. One moment: 4 bytes a value in fp32, 1.02 in 8 bits. A value whose
direction is exactly 0, or not a number, moves by its weight decay alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from qlora_native import ops
from qlora_native.optim.native import NativeOptimizer, check_betas


class _LionRule(NativeOptimizer):
    moments = ("exp_avg",)
    step_op = staticmethod(ops.lion_step)
    step_8bit_op = staticmethod(ops.lion_8bit_step)

    @staticmethod
    def _check_rule(group: dict[str, Any]) -> None:
        check_betas(group)

    @staticmethod
    def _progress(state: dict[str, Any], is_new: bool) -> int:
        return 0  # every step is alike

    @staticmethod
    def _arguments(group: dict[str, Any], progress: int) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {"beta1": float(beta1), "beta2": float(beta2)}


class Lion(_LionRule):
    """Lion with 32-bit state.

    Args:
        params: dense, contiguous float32, float16 or bfloat16 parameters, or dicts of groups.
        lr: some three to ten times less than AdamW's, as the paper advises.
        betas: of the direction and of the momentum, each in [0, 1).
        weight_decay: decoupled, as in AdamW; with a smaller lr a larger one does the same.
        maximize: go up instead of down.

    GradScaler hands its scale to the step, which divides by it; gradients are left scaled.

    Raises:
        ValueError: a setting is out of its range, or a parameter is sparse or not contiguous.
        TypeError: a parameter has another dtype.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize},
        )


class Lion8bit(_LionRule):
    """Lion with 8-bit state; tensors of fewer than `min_8bit_size` values keep 32 bits.

    The arguments of Lion, and min_8bit_size, which bitsandbytes names and sets likewise.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        min_8bit_size: int = 4096,
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "weight_decay": weight_decay,
                "maximize": maximize,
                "min_8bit_size": min_8bit_size,
            },
        )
