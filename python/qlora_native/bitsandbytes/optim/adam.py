"""Adam with 32-bit and with 8-bit state (Kingma & Ba, 2015), its weight decay decoupled.

bitsandbytes' Adam is its AdamW with a weight decay of 0 by default; so it is here.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from qlora_native import ops
from qlora_native.bitsandbytes.optim.optimizer import Optimizer8bit
from qlora_native.optim.native import check_betas, check_not_negative, refuse


class AdamRule(Optimizer8bit):
    """Two moments, and qlora_native.optim.AdamW's formula."""

    moments = ("state1", "state2")
    signs: ClassVar[tuple[bool, ...]] = (True, False)
    step_op = staticmethod(ops.adamw_step)
    step_8bit_op = staticmethod(ops.adamw_8bit_step)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        refuse(amsgrad=amsgrad)
        unused = {"alpha": 0.0, "t_alpha": None, "t_beta3": None}  # in bitsandbytes' files
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **unused}
        super().__init__(params, defaults, optim_bits, args, min_8bit_size, is_paged)

    @staticmethod
    def _check_rule(group: dict[str, Any]) -> None:
        check_not_negative(group, "eps")
        check_betas(group)

    @staticmethod
    def _arguments(group: dict[str, Any], progress: int) -> dict[str, Any]:
        beta1, beta2 = group["betas"]
        return {
            "beta1": float(beta1),
            "beta2": float(beta2),
            "eps": float(group["eps"]),
            "step": progress,
        }


class Adam(AdamRule):
    """Adam with optim_bits of state.

    Args:
        params: dense float32, float16 or bfloat16 parameters, or dicts of groups.
        lr, betas, eps, weight_decay: as in torch.optim.AdamW, for each group too.
        amsgrad: must be False.
        optim_bits: 32, or 8 in tensors of at least min_8bit_size values.
        args: an object with optim_bits, min_8bit_size, max_unorm (0) and skip_zeros (False).
        is_paged: let large tensors' state give way (qlora_native.optim.PagedAdamW).

    Raises:
        ValueError, TypeError: a setting is out of its range, or a parameter of another kind.
        NotImplementedError: a setting that bitsandbytes has and we have not.
    """


class Adam8bit(Adam):
    """Adam with 8 bits of state; optim_bits must be left alone."""

    fixed_bits = 8


class Adam32bit(Adam):
    """Adam with 32 bits of state."""

    fixed_bits = 32


class PagedAdam(Adam):
    """Adam with paged state."""

    always_paged = True


class PagedAdam8bit(Adam8bit):
    """Adam8bit with paged state."""

    always_paged = True


class PagedAdam32bit(Adam32bit):
    """Adam32bit with paged state."""

    always_paged = True
