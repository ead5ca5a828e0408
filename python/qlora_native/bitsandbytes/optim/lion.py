"""Lion with 32-bit and with 8-bit state (Chen et al., 2023, algorithm 2)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from qlora_native import ops
from qlora_native.bitsandbytes.optim.optimizer import Optimizer8bit
from qlora_native.optim.native import check_betas


class Lion(Optimizer8bit):
    """Lion with optim_bits of state.

    Args:
        params: dense float32, float16 or bfloat16 parameters, or dicts of groups.
        lr, betas, weight_decay: as in qlora_native.optim.Lion, for each group too.
        optim_bits, args, min_8bit_size, is_paged: as in Adam.
    """

    moments = ("state1",)
    signs: ClassVar[tuple[bool, ...]] = (True,)
    step_op = staticmethod(ops.lion_step)
    step_8bit_op = staticmethod(ops.lion_8bit_step)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": 0.0, "weight_decay": weight_decay}
        super().__init__(params, defaults, optim_bits, args, min_8bit_size, is_paged)

    @staticmethod
    def _check_rule(group: dict[str, Any]) -> None:
        check_betas(group)

    @staticmethod
    def _arguments(group: dict[str, Any], progress: int) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {"beta1": float(beta1), "beta2": float(beta2)}


class Lion8bit(Lion):
    """Lion with 8 bits of state; optim_bits must be left alone."""

    fixed_bits = 8


class Lion32bit(Lion):
    """Lion with 32 bits of state."""

    fixed_bits = 32


class PagedLion(Lion):
    """Lion with paged state."""

    always_paged = True


class PagedLion8bit(Lion8bit):
    """Lion8bit with paged state."""

    always_paged = True


class PagedLion32bit(Lion32bit):
    """Lion32bit with paged state."""

    always_paged = True
