"""SGD with momentum, with 32-bit and with 8-bit state."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from qlora_native import ops
from qlora_native.bitsandbytes.optim.optimizer import Optimizer8bit
from qlora_native.optim.native import check_betas


class SGD(Optimizer8bit):
    """SGD with momentum and optim_bits of state.

    Args:
        params: dense float32, float16 or bfloat16 parameters, or dicts of groups.
        lr, weight_decay: as in torch.optim.SGD, for each group too.
        momentum: more than 0.
        dampening, nesterov: bitsandbytes takes them and does without; so does this, and warns.
            qlora_native.optim.SGD has both.
        optim_bits, args, min_8bit_size: as in Adam.

    Raises:
        NotImplementedError: momentum is 0.
    """

    moments = ("state1",)
    signs: ClassVar[tuple[bool, ...]] = (True,)
    step_op = staticmethod(ops.sgd_step)
    step_8bit_op = staticmethod(ops.sgd_8bit_step)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
    ) -> None:
        if momentum == 0:
            raise NotImplementedError("momentum must be more than 0: torch.optim.SGD does without")
        if dampening or nesterov:
            warnings.warn(
                f"dampening={dampening} and nesterov={nesterov} are without effect, as in "
                "bitsandbytes; qlora_native.optim.SGD has both",
                stacklevel=2,
            )
        betas = (momentum, dampening)
        defaults = {"lr": lr, "betas": betas, "eps": 0.0, "weight_decay": weight_decay}
        super().__init__(params, defaults, optim_bits, args, min_8bit_size)

    @staticmethod
    def _check_rule(group: dict[str, Any]) -> None:
        check_betas(group)

    @staticmethod
    def _arguments(group: dict[str, Any], progress: int) -> dict[str, Any]:
        return {
            "momentum": float(group["betas"][0]),
            "dampening": 0.0,
            "nesterov": False,
            "first_step": progress == 1,
        }


class SGD8bit(SGD):
    """SGD with 8 bits of state; optim_bits must be left alone."""

    fixed_bits = 8


class SGD32bit(SGD):
    """SGD with 32 bits of state."""

    fixed_bits = 32
