"""AdamW with 32-bit and with 8-bit state (Loshchilov & Hutter, 2019)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from qlora_native.bitsandbytes.optim.adam import AdamRule


class AdamW(AdamRule):
    """Adam, whose arguments it takes, with a weight decay of 0.01 by default."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, optim_bits, args, min_8bit_size, is_paged
        )


class AdamW8bit(AdamW):
    """AdamW with 8 bits of state; optim_bits must be left alone."""

    fixed_bits = 8


class AdamW32bit(AdamW):
    """AdamW with 32 bits of state."""

    fixed_bits = 32


class PagedAdamW(AdamW):
    """AdamW with paged state."""

    always_paged = True


class PagedAdamW8bit(AdamW8bit):
    """AdamW8bit with paged state."""

    always_paged = True


class PagedAdamW32bit(AdamW32bit):
    """AdamW32bit with paged state."""

    always_paged = True
