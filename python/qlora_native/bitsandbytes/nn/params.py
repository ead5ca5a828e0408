"""`Params4bit`: the parameter that quantizes itself when it is moved to a device."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native.bitsandbytes.functional import quantize_4bit
from qlora_native.bitsandbytes.quant_state import QuantState

# Attributes of a Params4bit, with their defaults.
_DEFAULTS: dict[str, Any] = {
    "blocksize": 64,
    "compress_statistics": True,
    "quant_type": "fp4",
    "quant_state": None,
    "quant_storage": torch.uint8,
    "bnb_quantized": False,
    "module": None,
}


def _of_state(*path: str) -> property:
    """A property that reads a field of quant_state: FSDP walks dotted keys of a state_dict so."""

    def read(self: Params4bit) -> Any:
        value = self.__dict__.get("quant_state")
        for name in path:
            value = None if value is None else getattr(value, name)
        if value is None and self.__dict__.get("quant_state") is None:
            raise AttributeError(f"'Params4bit' object has no attribute {path[-1]!r}")
        return value

    return property(read)


class Params4bit(nn.Parameter):
    """A weight that is floats until it is moved to a device, and 4-bit codes from then on.

    Args:
        data: floating, any shape; or the codes, where bnb_quantized.
        requires_grad: False: codes get no gradient.
        quant_state: of the codes.
        blocksize, compress_statistics, quant_type, quant_storage: as in functional.quantize_4bit.
        module: the layer that holds the parameter; its quant_state is set with this one's.
        bnb_quantized: whether data are codes.

    `.to`, `.cpu` and `.cuda` quantize. Once quantized, no cast touches the codes.
    """

    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_state: QuantState | None
    quant_storage: torch.dtype
    bnb_quantized: bool
    module: Any

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: Any = None,
        bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> Params4bit:
        data = torch.empty(0) if data is None else data
        self: Params4bit = torch.Tensor._make_subclass(cls, data, requires_grad)
        self.__dict__.update(
            blocksize=64 if blocksize is None else blocksize,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_state=quant_state,
            quant_storage=quant_storage,
            bnb_quantized=bnb_quantized,
            module=module,
        )
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: dict[str, Any],
        requires_grad: bool = False,
        device: torch.device | str = "cuda",
        module: Any = None,
        **kwargs: Any,
    ) -> Params4bit:
        """The parameter of a checkpoint's codes and of its other keys (QuantState.from_dict)."""
        state = QuantState.from_dict(quantized_stats, device)
        if module is not None:
            module.quant_state = state
        return cls(
            data.to(device),
            requires_grad,
            state,
            state.blocksize,
            state.nested,
            state.quant_type,
            data.dtype,
            module,
            bnb_quantized=True,
        )

    def _quantize(self, device: torch.device | str | None) -> Params4bit:
        packed, state = quantize_4bit(
            self.data.contiguous().to(device),
            blocksize=self.blocksize,
            compress_statistics=bool(self.compress_statistics),
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        self.data = packed
        self.quant_state = state
        if self.module is not None:
            self.module.quant_state = state
        self.bnb_quantized = True
        return self

    # ---- moves and casts ----

    def to(self, *args: Any, **kwargs: Any) -> Params4bit:
        """Quantize on the device named, in place; or, quantized, a parameter on that device."""
        device, asked, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        dtype = None if self.bnb_quantized else asked
        if not self.bnb_quantized and device is not None and device.type != "meta":
            return self._quantize(device)
        if self.quant_state is not None and device is not None:
            self.quant_state.to(device)
        moved = self.data.to(device=device, dtype=dtype, non_blocking=non_blocking)
        attributes = {name: self.__dict__[name] for name in _DEFAULTS}
        return type(self)(moved, requires_grad=self.requires_grad, **attributes)

    def cpu(self, memory_format: Any = None) -> Params4bit:
        return self.to(device="cpu")

    def cuda(
        self,
        device: int | torch.device | str | None = None,
        non_blocking: bool = False,
        memory_format: Any = None,
    ) -> Params4bit:
        return self.to(device="cuda" if device is None else device, non_blocking=non_blocking)

    def half(self, memory_format: Any = None) -> Params4bit:
        return self.to(dtype=torch.float16)

    def float(self, memory_format: Any = None) -> Params4bit:
        return self.to(dtype=torch.float32)

    def bfloat16(self, memory_format: Any = None) -> Params4bit:
        return self.to(dtype=torch.bfloat16)

    def double(self, memory_format: Any = None) -> Params4bit:
        return self.to(dtype=torch.float64)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Pieces of the codes stay parameters of this kind; whatever else is computed is a tensor.
        call: Any = super().__torch_function__
        result = call(func, types, args, kwargs or {})
        if func not in (torch.chunk, torch.split):
            return result
        whole = args[0]
        attributes = {name: whole.__dict__[name] for name in _DEFAULTS}
        return tuple(cls(piece, whole.requires_grad, **attributes) for piece in result)

    # ---- copies ----

    def __deepcopy__(self, memo: dict[int, Any]) -> Params4bit:
        attributes = {name: self.__dict__[name] for name in _DEFAULTS}
        module = memo.get(id(self.module))  # its copy, where the layer is what is being copied
        attributes |= {"quant_state": copy.deepcopy(self.quant_state, memo), "module": module}
        memo[id(self)] = new = type(self)(self.data.clone(), self.requires_grad, **attributes)
        return new

    def __copy__(self) -> Params4bit:
        attributes = {name: self.__dict__[name] for name in _DEFAULTS}
        return type(self)(self.data, self.requires_grad, **attributes)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        attributes = {name: self.__dict__[name] for name in _DEFAULTS}
        return type(self), (self.data, self.requires_grad), attributes

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({name: state[name] for name in _DEFAULTS})

    # ---- fields of the state ----

    absmax = _of_state("absmax")
    code = _of_state("code")
    quant_map = _of_state("code")
    offset = _of_state("offset")
    state2 = _of_state("state2")
    nested_absmax = _of_state("state2", "absmax")
    nested_blocksize = _of_state("state2", "blocksize")
    nested_quant_map = _of_state("state2", "code")
    nested_dtype = _of_state("state2", "dtype")
    nested_offset = _of_state("offset")
