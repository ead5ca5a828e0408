"""peft's LoRA on the layers that stand in for bitsandbytes': one op in place of peft's four.

Importing this module makes peft find it; `install_as_bitsandbytes()` sees to that. The layers are
peft's own `Linear4bit` in all but the forward of one plain adapter.
"""

from __future__ import annotations

import functools
from typing import Any

from peft.tuners.lora import bnb

from qlora_native.bitsandbytes.functional import bytes_of
from qlora_native.bitsandbytes.nn import Linear4bit
from qlora_native.integrations.peft_forward import OneOpForward, WeightParts


class LoraBnbLinear4bit(OneOpForward, bnb.Linear4bit):  # type: ignore[misc]
    """peft's LoRA layer around a bitsandbytes `Linear4bit` of ours."""

    def weight_parts(self) -> WeightParts | None:
        layer = self.base_layer
        state = getattr(layer.weight, "quant_state", None)
        shape = [layer.out_features, layer.in_features]
        if state is None or list(state.shape) != shape or not layer.compute_type_is_set:
            return None  # the layer's own forward puts that right, once
        absmax, nested_absmax, nested_offset = state.scales()
        return WeightParts(
            bytes_of(layer.weight),
            absmax,
            nested_absmax,
            nested_offset,
            state.blocksize,
            state.quant_type,
            layer.compute_dtype,
        )


def register() -> None:
    """Let peft make our layer where it would make its own. A second time is nothing."""
    if getattr(bnb.dispatch_bnb_4bit, "_makes_one_op", False):
        return
    bnb.dispatch_bnb_4bit = _with_one_op(bnb.dispatch_bnb_4bit)


def _with_one_op(dispatch: Any) -> Any:
    @functools.wraps(dispatch)
    def dispatch_bnb_4bit(target: Any, adapter_name: str, config: Any, **kwargs: Any) -> Any:
        made = dispatch(target, adapter_name, config=config, **kwargs)
        if type(made) is bnb.Linear4bit and isinstance(made.base_layer, Linear4bit):
            made.__class__ = LoraBnbLinear4bit  # which differs by methods alone
        return made

    dispatch_bnb_4bit._makes_one_op = True  # type: ignore[attr-defined]
    return dispatch_bnb_4bit


register()
