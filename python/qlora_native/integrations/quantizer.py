"""The quantizers that transformers' from_pretrained calls, for 4-bit layers of ours.

While a model loads, each linear to be quantized is a `_Loading`, one float parameter on the meta
device; transformers reads the checkpoint's tensors one by one and hands each to an operation, which
quantizes it (`_Quantize`) or takes its packed parts together (`_TakePacked`). Once all are there,
each _Loading gives way to its LoadedLinear4bit. Experts go the same way (loading_experts.py). So no
more is in memory than the 4-bit model and one float weight, or one stack of experts.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from qlora_native.experts import as_rows, is_experts
from qlora_native.functional import quantize_4bit
from qlora_native.integrations.config import METHOD
from qlora_native.integrations.loaded_linear import LoadedLinear4bit, StoredForm
from qlora_native.integrations.loading_experts import LoadingExperts, fuses_experts, packed_names
from qlora_native.integrations.report import LoadReport
from qlora_native.linear import Linear4bit
from qlora_native.model import quantized_experts, to_linear, why_not_experts, why_not_itself
from qlora_native.module_tree import as_linear, is_conv1d, is_linear, places, replace
from qlora_native.quant_state import QuantState

Model = Any  # transformers.PreTrainedModel, whose annotations are partial

logger = logging.getLogger(__name__)

_PARTS = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    "quant_state.bitsandbytes__nf4",
    "quant_state.bitsandbytes__fp4",
)


class QLoRANativeQuantizer(HfQuantizer):  # type: ignore[misc]
    """The quantizer of a QLoRANativeConfig. After loading, `report` tells what was quantized."""

    requires_calibration = False
    quantized_element_size = 0.5
    is_trainable = True
    is_compileable = True
    serialized_names = {  # noqa: RUF012
        "weight": ["weight", *(f"weight.{part}" for part in _PARTS)],
        **packed_names(_PARTS),
    }
    quantizes_experts = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.report = LoadReport()

    # ---- before loading ----

    def update_device_map(self, device_map: Any) -> Any:
        """Without one, the model goes to the GPU where there is one, as bitsandbytes has it."""
        if device_map is not None:
            return device_map
        if torch.cuda.is_available():
            return {"": torch.cuda.current_device()}
        return {"": "cpu"}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        places = set(device_map.values()) if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                "device_map puts a part of the model on the disk, or on the CPU beside a GPU, from "
                "where 4-bit weights are not brought back: put it all on one kind of device"
            )

    def _process_model_before_weight_loading(self, model: Model, **kwargs: Any) -> Model:
        skipped = self.get_modules_to_not_convert(
            model, self._skip_modules(), getattr(model, "_keep_in_fp32_modules", None)
        )
        for name, names in places(model).items():
            module = model.get_submodule(name)
            if self.quantizes_experts and is_experts(module):
                self._prepare_experts(model, name, names, skipped)
                continue
            why = why_not_itself(module, name, ())
            if why is None and is_linear(module) and not should_convert_module(name, skipped):
                why = "in skip_modules" if self._skip_modules() else "left by default, or tied"
            if why is not None:
                self.report.leave(name, module, why)
            elif is_linear(module):
                replace(model, names, module, _Loading(module))
                self.report.quantized.append(name)
        return model

    def _prepare_experts(
        self, model: Model, name: str, names: list[str], skipped: list[str]
    ) -> None:
        module = model.get_submodule(name)
        why = why_not_experts(module, name, (), self._how()["blocksize"])
        if why is None and not should_convert_module(name, skipped):
            why = "in skip_modules"
        if why is not None:
            self.report.leave(name, module, why)
            return
        loading = LoadingExperts(module)
        replace(model, names, module, loading)
        self.report.quantized += [f"{name}.{stack}" for stack in loading.shapes]

    def param_needs_quantization(self, model: Model, param_name: str, **kwargs: Any) -> bool:
        owner, _, leaf = param_name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, LoadingExperts):
            return leaf in module.shapes
        return leaf == "weight" and isinstance(module, _Loading)

    # ---- while loading ----

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"deserialize": _TakePacked}

    def quantize(self, weight: Tensor, name: str) -> tuple[Tensor, QuantState]:
        """Packed codes and scales of a float weight [out_features, in_features]."""
        rounding = self._scale_rounding(weight)
        return quantize_4bit(weight, **self._how(), scale_rounding=rounding, name=name)

    # ---- after loading ----

    def _process_model_after_weight_loading(self, model: Model, **kwargs: Any) -> Model:
        # Our operation reads packed weights; Linear4bit's own state dict writes them.
        experts = {n: m for n, m in model.named_modules() if isinstance(m, LoadingExperts)}
        model._weight_conversions = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or []
            if not (
                isinstance(conversion, WeightConverter)
                and (
                    any(isinstance(op, _TakePacked) for op in conversion.operations)
                    or (experts and fuses_experts(conversion))
                )
            )
        ]
        loading = {n: m for n, m in model.named_modules() if isinstance(m, _Loading)}
        self._require_all(model, loading, experts)
        names_of = places(model)
        for name, module in loading.items():
            new = module.loaded(self._compute_dtype(), self._scale_rounding(module.weight))
            _replace_with_hook(model, names_of[name], module, new)
        for name, mixture in experts.items():
            rounding = self._scale_rounding(next(iter(mixture.parameters())))
            _replace_with_hook(model, names_of[name], mixture, mixture.loaded(rounding))
        # A BitsAndBytesConfig says "bitsandbytes", of whose layers transformers refuses casts and
        # asks for the package before it moves them.
        model.quantization_method = METHOD
        # peft and accelerate ask for this or for is_loaded_in_4bit, by which transformers'
        # num_parameters would import bitsandbytes.
        model.is_loaded_in_8bit = True
        if importlib.util.find_spec("peft") is not None:
            importlib.import_module("qlora_native.integrations.peft")
        self.report.tell(model, logger)
        return model

    def _require_all(
        self, model: Model, loading: dict[str, _Loading], experts: dict[str, LoadingExperts]
    ) -> None:
        missing = [f"{name}.weight" for name, module in loading.items() if module.state is None]
        missing += [f"{name}.{stack}" for name, m in experts.items() for stack in m.missing()]
        missing += [
            f"{name}.bias"
            for name, module in loading.items()
            if module.bias is not None and not getattr(module.bias, "_is_hf_initialized", False)
        ]
        if missing:
            raise ValueError(
                f"{getattr(model, 'name_or_path', '') or 'the checkpoint'} lacks {_listed(missing)}"
                ", of layers to be quantized: it is of another model or was copied in part. Copy "
                "it again, or name in skip_modules the layers that are to start anew"
            )
        tensors = [*model.named_parameters(), *model.named_buffers()]
        if meta := [name for name, tensor in tensors if tensor.is_meta]:
            raise ValueError(f"{_listed(meta)} were left on the meta device: nothing loaded them")

    def _how(self) -> dict[str, Any]:
        """What a weight is quantized with, but for the rounding of its scales."""
        config = self.quantization_config
        return {
            "blocksize": config.blocksize,
            "format": config.format,
            "double_quant": config.double_quant,
        }

    def _skip_modules(self) -> list[str] | None:
        names: list[str] | None = self.quantization_config.skip_modules
        return names

    def _compute_dtype(self) -> torch.dtype | None:
        dtype: torch.dtype | None = self.quantization_config.compute_dtype
        return dtype

    def _scale_rounding(self, weight: Tensor) -> str:
        rounding: str = self.quantization_config.scale_rounding
        return rounding

    # ---- later ----

    def is_serializable(self) -> bool:
        return True

    def _dequantize(self, model: Model, dtype: torch.dtype | str | None = None) -> Model:
        """Every 4-bit layer as an nn.Linear of dtype, experts as they were, for good."""
        # save_pretrained leaves the config with the dtype's name
        to: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        names_of = places(model)
        for name, experts in list(quantized_experts(model)):
            floats = experts.to_module(to or next(experts.stacks())[1].weight_dtype)
            _replace_with_hook(model, names_of[name], experts, floats)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, Linear4bit):
                linear = to_linear(layer, to or layer.weight_dtype)
                _replace_with_hook(model, names_of[name], layer, linear)
        model.is_loaded_in_8bit = False
        return model


class BitsAndBytesQuantizer(QLoRANativeQuantizer):
    """Our layers for a BitsAndBytesConfig that asks for 4 bits; experts stay floats, as with it."""

    quantizes_experts = False

    def _how(self) -> dict[str, Any]:
        config = self.quantization_config
        return {
            "blocksize": 64,  # what bitsandbytes' layers have
            "format": config.bnb_4bit_quant_type,
            "double_quant": config.bnb_4bit_use_double_quant,
        }

    def _skip_modules(self) -> list[str] | None:
        names: list[str] | None = self.quantization_config.llm_int8_skip_modules
        return names

    def _compute_dtype(self) -> torch.dtype | None:
        dtype: torch.dtype | None = self.quantization_config.bnb_4bit_compute_dtype
        return dtype

    def _scale_rounding(self, weight: Tensor) -> str:
        return "bitsandbytes_cpu" if weight.device.type == "cpu" else "nearest"


class _Loading(nn.Module):
    """A linear whose 4-bit weight is still to come."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.fan_in_fan_out = is_conv1d(linear)
        linear = as_linear(linear)
        # [out_features, in_features] of floats on the meta device; packed codes once they are there
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.bias = linear.bias
        self.state: QuantState | None = None
        self.stored: StoredForm | None = None

    def loaded(self, compute_dtype: torch.dtype | None, scale_rounding: str) -> LoadedLinear4bit:
        """The layer, once its weight is there."""
        assert self.state is not None
        base = Linear4bit.from_tensors(self.weight.data, self.state, self.bias)
        base.fan_in_fan_out = self.fan_in_fan_out
        base.scale_rounding = scale_rounding
        return LoadedLinear4bit.from_base(base, compute_dtype, self.stored).requires_grad_(False)


class _Quantize(ConversionOps):  # type: ignore[misc]
    """A float weight of a _Loading -> its packed codes."""

    def __init__(self, hf_quantizer: QLoRANativeQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if isinstance(module, LoadingExperts):
                packed, module.states[leaf] = self.hf_quantizer.quantize(
                    as_rows(module, weight), name
                )
                result[name] = nn.Parameter(packed, requires_grad=False)
                continue
            weight = weight.T.contiguous() if module.fan_in_fan_out else weight
            packed, module.state = self.hf_quantizer.quantize(weight, name)
            result[name] = nn.Parameter(packed, requires_grad=False)
        return result


class _TakePacked(ConversionOps):  # type: ignore[misc]
    """The parts of a packed weight -> its packed codes, and the rest into its _Loading."""

    def __init__(self, hf_quantizer: QLoRANativeQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Any]:
        owner, _, leaf = full_layer_name.rpartition(".")
        module = model.get_submodule(owner)
        of_experts = isinstance(module, LoadingExperts)
        if not isinstance(module, _Loading) and not (of_experts and len(input_dict) > 1):
            if len(input_dict) > 1:
                raise ValueError(
                    f"{full_layer_name} is packed in 4 bits, but the config's skip_modules, or the "
                    "kind of its layer, leave it as floats"
                )
            return input_dict
        parts = {name: v[0] if isinstance(v, list) else v for name, v in input_dict.items()}
        own = f"experts.{leaf}" if of_experts else "weight"
        shape = module.shape(leaf) if of_experts else module.weight.shape
        weight = parts.pop(own, None)
        if weight is None:
            raise ValueError(f"{full_layer_name} is missing beside {sorted(parts)}")
        try:
            state = QuantState.from_bnb_dict(parts, f"{own}.")
            if state.shape != shape:
                raise ValueError(f"its shape is {list(state.shape)}, not {list(shape)}")
            packed = state.check_packed(weight)
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{full_layer_name}: {error.args[0]}") from error
        if of_experts:
            module.states[leaf] = state
        else:
            by_name = {name.removeprefix("weight."): part for name, part in parts.items()}
            module.state, module.stored = state, StoredForm.of(weight, by_name, state)
        return {own: nn.Parameter(packed, requires_grad=False)}


def _replace_with_hook(model: Model, names: list[str], old: nn.Module, new: nn.Module) -> None:
    """module_tree.replace, with the hook by which accelerate brings inputs to a layer's device."""
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module, remove_hook_from_module

        remove_hook_from_module(old)
        add_hook_to_module(new, hook)
    replace(model, names, old, new)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")
