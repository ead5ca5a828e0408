"""`Linear4bit`: nn.Linear on a frozen weight held in 4 bits.

The packed codes and their scales are buffers that no dtype cast touches: `.half()`, `.float()` and
`.to(torch.bfloat16)` change the bias alone. In a state dict they stand under bitsandbytes' keys
(bnb_keys.py), so `load_state_dict` reads what bitsandbytes wrote and the other way round; a
float `weight` is read too, and quantized.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native import autograd
from qlora_native.functional import dequantize_4bit, quantize_4bit
from qlora_native.quant_state import NESTED_BLOCKSIZE, WEIGHT_DTYPES, QuantState


class Linear4bit(nn.Module):
    """y = x W^T + bias, W [out_features, in_features] frozen, in 4 bits (QLoRA, section 3).

    Args:
        in_features, out_features: of W.
        bias: whether there is one.
        format: "nf4" or "fp4".
        blocksize: values that share a scale: a power of two, 32 to 4096.
        double_quant: whether the scales are quantized too.
        scale_rounding: "nearest" or "bitsandbytes_cpu" (functional.quantize_4bit).
        dtype: of the bias, and what `dequantize` gives; torch's default dtype if None.
        device: "meta" allocates nothing: load a state dict with assign=True then.

    A new layer is initialized as nn.Linear's and quantized. `from_linear` quantizes an existing
    one, `from_tensors` takes quantized parts as they are.
    """

    weight: Tensor  # uint8 [ceil(N*K/2), 1], two codes a byte
    absmax: Tensor  # fp32 [n_blocks]; uint8 when double-quantized
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    bias: nn.Parameter | None

    # Buffers that follow the module's device but never its dtype.
    _kept_dtype: tuple[str, ...] = ("weight", "absmax", "nested_absmax", "nested_offset")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        format: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        scale_rounding: str = "nearest",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        shape = torch.Size((out_features, in_features))
        self._init_parts(*_empty_quantized(shape, format, blocksize, double_quant, dtype))
        self.scale_rounding = scale_rounding
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device="meta"))
        device = torch.empty(0).device if device is None else torch.device(device)
        if device.type != "meta":
            self.to_empty(device=device)
            self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        format: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        scale_rounding: str = "nearest",
        name: str = "weight",
    ) -> Linear4bit:
        """The quantized form of `linear`, whose bias Parameter it keeps. `name` is for errors.

        A linear on the meta device gives a layer on the meta device.
        """
        packed, state = cls._quantize(
            linear.weight.detach(), format, blocksize, double_quant, scale_rounding, name
        )
        layer = cls.from_tensors(packed, state)
        layer.scale_rounding = scale_rounding
        layer.bias = linear.bias
        layer.training = linear.training
        return layer

    @classmethod
    def from_tensors(
        cls, packed: Tensor, state: QuantState, bias: Tensor | None = None
    ) -> Linear4bit:
        """A layer that holds these very tensors; nothing is copied or quantized."""
        if len(state.shape) != 2:
            raise ValueError(f"state must be of a matrix [N, K], got shape {list(state.shape)}")
        layer = Linear4bit.__new__(Linear4bit)
        nn.Module.__init__(layer)
        layer._init_parts(state.check_packed(packed), state)
        if bias is not None:
            if bias.shape != (layer.out_features,):
                raise ValueError(
                    f"bias must have shape [{layer.out_features}], got {list(bias.shape)}"
                )
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    def _init_parts(self, packed: Tensor, state: QuantState) -> None:
        *_, self.out_features, self.in_features = state.shape
        self.scale_rounding = "nearest"
        # Whether the module this one replaced stored its weight [in, out] (GPT-2's Conv1D).
        self.fan_in_fan_out = False
        for name in self._kept_dtype:
            self.register_buffer(name, None, persistent=False)
        self.register_parameter("bias", None)
        self._set_quantized(packed, state)

    def _init_as(self, other: Linear4bit) -> None:
        """Become a layer on the tensors of `other`."""
        nn.Module.__init__(self)
        self._init_parts(other.weight, other.quant_state)
        self.scale_rounding = other.scale_rounding
        self.fan_in_fan_out = other.fan_in_fan_out
        self.bias = other.bias
        self.training = other.training

    def reset_parameters(self) -> None:
        """Initialize as nn.Linear is, then quantize."""
        bound = 1.0 / math.sqrt(self.in_features) if self.in_features > 0 else 0.0
        weight = torch.empty(
            self.out_features, self.in_features, dtype=self.weight_dtype, device=self.weight.device
        )
        nn.init.uniform_(weight, -bound, bound)
        self.quantize_weight(weight)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @torch.no_grad()
    def quantize_weight(self, weight: Tensor, name: str = "weight") -> None:
        """Replace the weight by this float one [out_features, in_features], quantized."""
        if weight.shape != self.shape:
            raise ValueError(f"{name} must have shape {list(self.shape)}, got {list(weight.shape)}")
        self._set_quantized(
            *self._quantize(
                weight.detach(),
                self.format,
                self.blocksize,
                self.double_quant,
                self.scale_rounding,
                name,
            )
        )

    @property
    def shape(self) -> torch.Size:
        """Of the weight."""
        return torch.Size((self.out_features, self.in_features))

    @property
    def double_quant(self) -> bool:
        """Whether the scales are quantized too."""
        return self.nested_absmax is not None

    @property
    def quant_state(self) -> QuantState:
        """Scales and layout of the weight; the tensors are the module's own."""
        return QuantState(
            self.absmax,
            self.shape,
            self.weight_dtype,
            self.blocksize,
            self.format,
            self.nested_absmax,
            self.nested_offset,
        )

    @property
    def W_q(self) -> Tensor:
        """The packed weight, by HQQ's name for it: peft calls `dequantize` of a layer with one."""
        return self.weight

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [out_features, in_features]; by default in the dtype it was quantized from."""
        return dequantize_4bit(self.weight, self.quant_state, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x's dtype, or in autocast's under it."""
        self._require_loaded(x)
        return autograd.linear_4bit(
            x,
            self.weight,
            self.absmax,
            self.nested_absmax,
            self.nested_offset,
            self.out_features,
            self.blocksize,
            self.format,
            self.bias,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format!r}, blocksize={self.blocksize}, "
            f"double_quant={self.double_quant}"
        )

    def _require_loaded(self, x: Tensor) -> None:
        if self.weight.is_meta and not x.is_meta:
            raise RuntimeError(
                f"the weight of {type(self).__name__}({self.extra_repr()}) is on the meta device: "
                "load it first, by load_state_dict(…, assign=True) or to_empty + load_state_dict"
            )

    @staticmethod
    def _quantize(
        weight: Tensor,
        format: str,
        blocksize: int,
        double_quant: bool,
        scale_rounding: str,
        name: str,
    ) -> tuple[Tensor, QuantState]:
        """Packed codes and state of a float weight; on the meta device, their outline."""
        if weight.dtype not in WEIGHT_DTYPES:
            raise TypeError(f"{name} must have dtype one of {WEIGHT_DTYPES}, got {weight.dtype}")
        if weight.is_meta:
            return _empty_quantized(weight.shape, format, blocksize, double_quant, weight.dtype)
        return quantize_4bit(
            weight, blocksize, format, double_quant, scale_rounding=scale_rounding, name=name
        )

    # ---- how the quantized parts travel ----

    def _set_quantized(self, packed: Tensor, state: QuantState) -> None:
        self.weight = packed
        self.absmax = state.absmax
        self.nested_absmax = state.nested_absmax
        self.nested_offset = state.nested_offset
        self.format = state.format
        self.blocksize = state.blocksize
        self.weight_dtype = state.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear4bit:
        quantized = {name: self._buffers[name] for name in self._kept_dtype}
        for name in quantized:
            self._buffers[name] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(quantized)
        for name, tensor in quantized.items():
            if tensor is not None:
                self._buffers[name] = _keeping_dtype(fn, tensor)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        name = self._saved_name(prefix)
        destination[name] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(self.quant_state.to_bnb_dict(f"{name}."))

    def _saved_name(self, prefix: str) -> str:
        return f"{prefix}weight"

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "weight"
        parts = {k: v for k, v in state_dict.items() if k == key or k.startswith(key + ".")}
        rest = {k: v for k, v in state_dict.items() if k not in parts}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if key not in parts:
            missing_keys.append(key)
            unexpected_keys.extend(parts)
            return
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        try:
            weight = parts[key]
            same_rank = weight.dim() == len(self.shape)
            if len(parts) == 1 and weight.is_floating_point() and same_rank:
                device = weight.device if assign else self.weight.device
                self.quantize_weight(weight.to(device), name=key)
            else:
                self._load_quantized(parts, prefix, assign)
        except (KeyError, ValueError, TypeError) as error:
            error_msgs.append(str(error.args[0] if error.args else error))

    def _load_quantized(self, parts: Mapping[str, Tensor], prefix: str, assign: bool) -> None:
        key = prefix + "weight"
        state = QuantState.from_bnb_dict(parts, key + ".")
        if state.shape != self.shape:
            raise ValueError(
                f"{key} must be of shape {list(self.shape)}, "
                f"its quant_state says {list(state.shape)}"
            )
        packed = state.check_packed(parts[key], name=key)
        if not assign:
            device = self.weight.device
            if device.type == "meta":
                raise ValueError(
                    f"{key} is on the meta device: pass assign=True to load_state_dict"
                )
            packed, state = packed.to(device, copy=True), state.to(device, copy=True)
        self._set_quantized(packed, state)


def _empty_quantized(
    shape: torch.Size, format: str, blocksize: int, double_quant: bool, dtype: torch.dtype
) -> tuple[Tensor, QuantState]:
    """Parts of the right shapes and dtypes on the meta device."""
    n_blocks = -(-shape.numel() // max(blocksize, 1))
    absmax = torch.empty(n_blocks, dtype=torch.float32, device="meta")
    state = QuantState(absmax, shape, dtype, blocksize, format)
    if double_quant:
        nested = absmax.new_empty(-(-n_blocks // NESTED_BLOCKSIZE))
        codes = absmax.to(torch.uint8)
        state = QuantState(codes, shape, dtype, blocksize, format, nested, absmax.new_empty(1))
    return torch.empty(state.packed_shape, dtype=torch.uint8, device="meta"), state


def _keeping_dtype(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """fn(tensor) where fn moves; where it casts, the bits stay and only its device is followed."""
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
