"""LoRA of peft on `nn.Linear4bit`: importing this module makes peft's own dispatch find it.

    import qlora_native.integrations.peft
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))

Where one plain adapter is active, a layer's forward is one op (ops.qlora_linear), which draws its
own dropout mask; otherwise it is the forward of peft's `lora.Linear` around the 4-bit layer.

What needs the weight itself is peft's code on the dequantized weight in float32: the initial values
(PiSSA, OLoRA, CorDA, …), DoRA's norms, merging. Where peft then changes the weight, the new
one is quantized as the old one was; merging keeps the old one beside it until it is unmerged.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import peft.tuners.lora.model as lora_model
import peft.tuners.tuners_utils as tuners_utils
import torch
from peft.tuners import lora
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from qlora_native.experts import StackedLinear4bit
from qlora_native.integrations.peft_forward import OneOpForward, WeightParts
from qlora_native.integrations.versions import check
from qlora_native.linear import Linear4bit
from qlora_native.lora import QLoRALinear
from qlora_native.model import quantized_layers
from qlora_native.quant_state import QuantState
from qlora_native.targets import ALL_LINEAR, output_embedding_names

# Initial values that do not look at the base weight.
_PLAIN_INITS = (True, False, "gaussian", "eva")


class LoraLinear4bit(OneOpForward, lora.Linear):  # type: ignore[misc]
    """peft's LoRA layer around a `Linear4bit`; its arguments are those of peft's `lora.Linear`.

    base_layer is the Linear4bit, with its weights untouched; lora_A, lora_B, scaling and all else
    are peft's. Raises ValueError for a layer that has an adapter of qlora_native's own.
    """

    base_layer: Any  # Linear4bit; an nn.Linear within _float_base

    # Weight and bias of the base, while it holds merged ones.
    _unmerged: tuple[Tensor, QuantState, Tensor | None] | None = None

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any):
        if isinstance(base_layer, QLoRALinear):
            raise ValueError(
                f"{kwargs.get('target_name', 'the target')} has an adapter of qlora_native.add_lora"
                " already: call qlora_native.model.remove_lora(model) before peft adds its own"
            )
        super().__init__(base_layer, adapter_name, config=_as_rows(config), **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # type: ignore[return-value]

    def weight_parts(self) -> WeightParts | None:
        base = self.base_layer
        return WeightParts(
            base.weight,
            base.absmax,
            base.nested_absmax,
            base.nested_offset,
            base.blocksize,
            base.format,
            getattr(base, "compute_dtype", None),
        )

    # ---- what needs the weight as floats ----

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        """peft's; what the initial values take out of the weight is quantized again."""
        if self.merged:
            self.unmerge()
        config = _as_rows(config)
        plain = config.init_lora_weights in _PLAIN_INITS
        if (plain and self.resolve_lora_variant(config=config) is None) or self._is_meta():
            super().update_layer(adapter_name, *args, config=config, **kwargs)
            return
        with self._float_base() as base:
            before = base.weight.detach().clone()
            super().update_layer(adapter_name, *args, config=config, **kwargs)
            after = base.weight.data
        if not torch.equal(after, before):
            self.base_layer.quantize_weight(after, name="what the adapter leaves of the weight")

    def loftq_init(self, adapter_name: str, config: Any) -> None:
        """Refused: of a weight that is on the 4-bit grid LoftQ leaves A = B = 0, which stay so."""
        raise ValueError(
            "init_lora_weights='loftq' needs the weights that were quantized, of which a 4-bit "
            "layer holds none: initialize plainly, then call qlora_native.integrations.peft_loftq."
            "replace_lora_weights_loftq(model, folder of the un-quantized model)"
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """peft's, on the dequantized weight; the sum is quantized anew, to the nearest codes."""
        layer = self.base_layer
        if not isinstance(layer, Linear4bit):  # within _float_base
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return
        merged = len(self.merged_adapters)
        unmerged = self._unmerged or _parts(layer)
        with self._float_base() as base:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if len(self.merged_adapters) == merged:
            return
        layer.quantize_weight(base.weight.data, name="the merged weight")
        if layer.bias is not None:
            layer.bias = nn.Parameter(base.bias.data.to(layer.bias.dtype), requires_grad=False)
        self._unmerged = unmerged

    def unmerge(self) -> None:
        """Base and adapters as they were before merging, to the bit."""
        layer = self.base_layer
        if not isinstance(layer, Linear4bit):
            super().unmerge()
            return
        if self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        packed, state, bias = self._unmerged
        device = layer.weight.device
        restored = Linear4bit.from_tensors(packed.to(device), state.to(device), bias)
        layer._set_quantized(restored.weight, restored.quant_state)
        if bias is not None:
            layer.bias = nn.Parameter(bias.to(device), requires_grad=bias.requires_grad)
        for name in self.merged_adapters:
            self._caches.pop(f"{name}-weight_norm", None)  # DoRA's, which its own unmerging takes
        self.merged_adapters.clear()
        self._unmerged = None

    def _is_meta(self) -> bool:
        return bool(self.get_base_layer().weight.is_meta)

    @contextmanager
    def _float_base(self) -> Iterator[nn.Linear]:
        """Within it, the base layer is an nn.Linear on the dequantized weight, in float32."""
        layer = self.base_layer
        base = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        base.weight = nn.Parameter(layer.dequantize(torch.float32), requires_grad=False)
        if layer.bias is not None:
            base.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        self.base_layer = base
        try:
            yield base
        finally:
            self.base_layer = layer


def _parts(layer: Linear4bit) -> tuple[Tensor, QuantState, Tensor | None]:
    return layer.weight, layer.quant_state, None if layer.bias is None else layer.bias.data


def _as_rows(config: Any) -> Any:
    """The config for a weight [out_features, in_features], which a Linear4bit of a Conv1D has too.

    peft says the same of an nn.Linear, and sets it in the caller's config; here it is a copy.
    """
    if not config.fan_in_fan_out:
        return config
    config = copy.copy(config)
    config.fan_in_fan_out = False
    return config


# ---- peft's dispatch -----------------------------------------------------------------------------


def register() -> None:
    """Let peft find `LoraLinear4bit`. Importing this module does it; a second time is nothing."""
    check("peft")
    if getattr(lora_model.dispatch_default, "_finds_linear_4bit", False):
        return
    lora_model.dispatch_default = _dispatch_before(lora_model.dispatch_default)
    tuners_utils._maybe_include_all_linear_layers = _including_linear_4bit(
        tuners_utils._maybe_include_all_linear_layers
    )
    AuxiliaryTrainingWrapper.check_module = _refusing_linear_4bit(
        AuxiliaryTrainingWrapper.check_module
    )
    peft.PeftModel.get_nb_trainable_parameters = _counting_linear_4bit(
        peft.PeftModel.get_nb_trainable_parameters
    )


def _dispatch_before(dispatch: Any) -> Any:
    @functools.wraps(dispatch)
    def dispatch_linear_4bit(
        target: nn.Module, adapter_name: str, config: Any, **kwargs: Any
    ) -> Any:
        base = getattr(target, "base_layer", target)
        is_linear = isinstance(base, Linear4bit) and not isinstance(base, StackedLinear4bit)
        if is_linear and kwargs.get("parameter_name") is None:
            kwargs.pop("parameter_name", None)
            return LoraLinear4bit(target, adapter_name, config=config, **kwargs)
        return dispatch(target, adapter_name, config=config, **kwargs)

    dispatch_linear_4bit._finds_linear_4bit = True  # type: ignore[attr-defined]
    return dispatch_linear_4bit


def _including_linear_4bit(include: Any) -> Any:
    """peft's resolution of target_modules="all-linear", which asks for subclasses of nn.Linear."""

    @functools.wraps(include)
    def with_linear_4bit(peft_config: Any, model: nn.Module) -> Any:
        wanted = getattr(peft_config, "target_modules", None)
        peft_config = include(peft_config, model)
        if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
            never = output_embedding_names(model)
            inside = tuple(
                f"{name}." for name, m in model.named_modules() if isinstance(m, lora.LoraLayer)
            )
            peft_config.target_modules |= {
                name
                for name, _ in quantized_layers(model)
                if name not in never and not name.startswith(inside)
            }
        return peft_config

    return with_linear_4bit


def _refusing_linear_4bit(check_module: Any) -> Any:
    """peft's check of modules_to_save: those train whole, which 4-bit weights cannot."""

    @functools.wraps(check_module)
    def with_linear_4bit(self: Any) -> None:
        if isinstance(self.original_module, Linear4bit):
            raise TypeError(
                "modules_to_save names a 4-bit layer, whose weight cannot be trained: leave it "
                "un-quantized (skip_modules of QLoRANativeConfig, skip of qlora_native.quantize), "
                "or give it an adapter by target_modules instead"
            )
        check_module(self)

    return with_linear_4bit


def _counting_linear_4bit(count: Any) -> Any:
    """peft's count of trainable and of all parameters; 4-bit weights are buffers, not of them."""

    @functools.wraps(count)
    def with_linear_4bit(self: nn.Module) -> tuple[int, int]:
        trainable, total = count(self)
        layers = {id(layer): layer for layer in self.modules() if isinstance(layer, Linear4bit)}
        return trainable, total + sum(layer.quant_state.shape.numel() for layer in layers.values())

    return with_linear_4bit


register()
