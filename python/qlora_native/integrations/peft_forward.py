"""The forward of peft's LoRA layers on 4-bit weights: one op where one plain adapter is active."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlora_native import autograd
from qlora_native.quant_state import WEIGHT_DTYPES


class WeightParts(NamedTuple):
    """A base layer's weight as the ops take it, and what it computes in (None: x's dtype)."""

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    blocksize: int
    format: str
    compute_dtype: torch.dtype | None


class OneOpForward:
    """Goes before a LoRA layer class of peft's, whose forward serves what the op does not.

    The op draws its own dropout mask, from a seed of torch's generator.
    """

    base_layer: Any

    def weight_parts(self) -> WeightParts | None:
        """The base layer's weight; None where it is not one that the op reads."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x's dtype or autocast's."""
        adapter = None if args or kwargs else self._only_plain_adapter()
        parts = None if adapter is None or x.dtype not in WEIGHT_DTYPES else self.weight_parts()
        if parts is None:
            result: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return result
        layer: Any = self
        dtype = parts.compute_dtype
        given, x = x.dtype, x if dtype is None else x.to(dtype)
        dropout = layer.lora_dropout[adapter]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        seed = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=x.device) if p else None
        y = autograd.qlora_linear(
            x,
            *parts[:-1],
            self.base_layer.bias,
            layer.lora_A[adapter].weight,
            layer.lora_B[adapter].weight,
            layer.scaling[adapter],
            p,
            seed,
        )
        return y if dtype is None else y.to(given)

    def _only_plain_adapter(self) -> str | None:
        """The name of the active adapter, if it is one and the op computes what peft would."""
        layer: Any = self
        if layer._disable_adapters or layer.merged_adapters or not _is_bare(self.base_layer):
            return None
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        if len(active) != 1:
            return None
        (name,) = active
        a, b = layer.lora_A[name], layer.lora_B[name]
        fits = (
            name not in layer.lora_variant
            and not layer.lora_bias[name]
            and type(a) is nn.Linear
            and type(b) is nn.Linear
            and type(layer.lora_dropout[name]) in (nn.Identity, nn.Dropout)
            and _is_bare(a)
            and _is_bare(b)
            and a.weight.dtype == b.weight.dtype
            and a.weight.dtype in WEIGHT_DTYPES
            and not a.weight.is_meta
            and not self.base_layer.weight.is_meta
        )
        return name if fits else None


def _is_bare(module: nn.Module) -> bool:
    """Whether calling the module does no more than its class's forward."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
