"""bitsandbytes' `QuantState`: its fields, its dictionaries, and the parts that our ops take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qlora_native import ops
from qlora_native.bitsandbytes.maps import sign_of
from qlora_native.bitsandbytes.utils import pack_dict_to_tensor, unpack_tensor_to_dict
from qlora_native.quant_state import FORMATS, NESTED_BLOCKSIZE

_PACKED = "quant_state.bitsandbytes__"


class QuantState:
    """Scales, map and layout of a blockwise quantized tensor.

    absmax      float32 [n_blocks], or uint8 codes of it where the state is nested
    shape       of the tensor that was quantized; None in 8 bits
    code        float32, the value of each code
    blocksize   values that share a scale
    quant_type  "nf4" or "fp4"; None in 8 bits
    dtype       of the tensor that was quantized
    offset      float32, one value: the mean that was taken from absmax; nested only, as the next
    state2      the QuantState of absmax
    """

    valid_quant_types = FORMATS
    valid_qs_type_keys = tuple(f"bitsandbytes__{name}" for name in FORMATS)
    valid_qs_keys = (
        "absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state", "quant_type",
        "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset",
    )  # fmt: skip

    def __init__(
        self,
        absmax: Tensor,
        shape: torch.Size | None = None,
        code: Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        state2: QuantState | None = None,
    ) -> None:
        self.absmax = absmax
        self.shape: Any = shape
        self.code: Any = code
        self.dtype: Any = dtype
        self.blocksize: Any = blocksize
        self.quant_type: Any = quant_type
        self.offset = offset
        self.state2 = state2

    @property
    def state2(self) -> QuantState | None:
        return self._state2

    @state2.setter
    def state2(self, state2: QuantState | None) -> None:
        self._state2 = state2
        # Whether the ops can read the scales as they are: told here, once, as it compares the map.
        self._has_known_scales = state2 is None or (
            state2.blocksize == NESTED_BLOCKSIZE and bool(sign_of(state2.code))
        )

    @property
    def nested(self) -> bool:
        """Whether the scales are themselves quantized."""
        return self._state2 is not None

    def scales(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """absmax, nested_absmax and nested_offset, as every op of qlora_native.ops takes them.

        Nested scales of another map or blocksize than double quantization's are dequantized.
        """
        state2 = self._state2
        if state2 is None or self.offset is None:
            return self.absmax.float(), None, None
        if self._has_known_scales:
            return self.absmax, state2.absmax, self.offset
        scales = dequantize_8bit(self.absmax, state2.absmax, state2.code, state2.blocksize)
        return scales + self.offset, None, None

    @classmethod
    def from_dict(cls, qs_dict: dict[str, Any], device: torch.device | str) -> QuantState:
        """The state from as_dict's dictionary, packed or not, or from a layer's state_dict.

        Keys may have prefixes that end with a dot. The dictionary is used up, as bitsandbytes
        does with the tensors that it loads.

        Raises:
            ValueError: an item is missing, or there is another one.
        """
        packed = [key for key, value in qs_dict.items() if _is_packed(key, value)]
        if "quant_type" not in qs_dict and len(packed) != 1:
            raise ValueError(
                f"qs_dict must have quant_type, or one key that ends with one of "
                f"{cls.valid_qs_type_keys}, got {sorted(qs_dict)}"
            )
        for key in packed:
            qs_dict.update(unpack_tensor_to_dict(qs_dict.pop(key)))
        items = {key.split(".")[-1]: value for key, value in qs_dict.items()}
        unknown = sorted(set(items) - set(cls.valid_qs_keys))
        wanted = ["absmax", "quant_map", "quant_type", "blocksize", "dtype", "shape"]
        if "nested_absmax" in items:
            wanted += ["nested_quant_map", "nested_blocksize", "nested_dtype", "nested_offset"]
        lacking = [key for key in wanted if key not in items]
        if unknown or lacking:
            raise ValueError(f"qs_dict lacks {lacking} and has {unknown}, which mean nothing here")

        offset = state2 = None
        if "nested_absmax" in items:
            offset = torch.tensor(float(items["nested_offset"]), device=device)
            state2 = cls(
                absmax=items["nested_absmax"].to(device),
                blocksize=items["nested_blocksize"],
                code=items["nested_quant_map"].to(device),
                dtype=getattr(torch, items["nested_dtype"]),
            )
        return cls(
            quant_type=items["quant_type"],
            absmax=items["absmax"].to(device),
            blocksize=items["blocksize"],
            code=items["quant_map"].to(device),
            dtype=getattr(torch, items["dtype"]),
            shape=None if items["shape"] is None else torch.Size(items["shape"]),
            offset=offset,
            state2=state2,
        )

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The fields by their names in a checkpoint.

        packed: tensors alone, the rest as JSON in a uint8 tensor: what safetensors can hold.
        """
        fields: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": _name(self.dtype),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.state2 is not None and self.offset is not None:
            fields |= {
                "nested_absmax": self.state2.absmax,
                "nested_blocksize": self.state2.blocksize,
                # A copy: the map is shared by all states, and safetensors drops shared tensors.
                "nested_quant_map": self.state2.code.clone(),
                "nested_dtype": _name(self.state2.dtype),
                "nested_offset": self.offset.item(),
            }
        if not packed or self.quant_type is None:
            return fields
        tensors = {key: value for key, value in fields.items() if isinstance(value, Tensor)}
        rest = {key: value for key, value in fields.items() if not isinstance(value, Tensor)}
        return {**tensors, _PACKED + self.quant_type: pack_dict_to_tensor(rest)}

    def to(self, device: torch.device | str | None) -> None:
        """Move the tensors to `device`, in place; dtypes never change."""
        self.absmax = self.absmax.to(device)
        if self.code is not None:
            self.code = self.code.to(device)
        if self.state2 is not None and self.offset is not None:
            self.offset = self.offset.to(device)
            self.state2.to(device)
            self.state2 = self.state2  # its map may have been on the meta device

    def __getattr__(self, name: str) -> Any:
        # FSDP walks the dotted keys of a state_dict by getattr: weight.quant_state.bitsandbytes__…
        if name.startswith("bitsandbytes__"):
            packed = self.as_dict(packed=True)
            if "quant_state." + name in packed:
                return packed["quant_state." + name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, idx: int) -> Any:
        """The fields as the list that a state was in early versions of bitsandbytes."""
        nested = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, nested, self.quant_type][idx]

    def __eq__(self, other: object) -> bool:
        """The same layout and, within 1e-6, the same scales, as bitsandbytes compares them."""
        if not isinstance(other, QuantState):
            return False
        layout = ("shape", "dtype", "blocksize", "quant_type", "state2")
        return (
            all(getattr(self, name) == getattr(other, name) for name in layout)
            and torch.allclose(self.absmax, other.absmax, atol=1e-6)
            and torch.allclose(self.code, other.code, atol=1e-6)
            and (self.offset is None) == (other.offset is None)
            and (self.offset is None or bool(self.offset == other.offset))
        )

    __hash__ = None  # type: ignore[assignment]


def dequantize_8bit(
    codes: Tensor,
    absmax: Tensor,
    code: Tensor,
    blocksize: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """code[codes] * absmax of the block, for any map, in the shape of codes."""
    signed = sign_of(code)
    if signed is not None:
        return ops.dequantize_8bit(codes, absmax, blocksize, signed, dtype)
    scales = absmax.repeat_interleave(blocksize)[: codes.numel()].view(codes.shape)
    return (code[codes.int()] * scales).to(dtype)


def is_quant_state_key(key: str) -> bool:
    """Whether a key of a state_dict, without its module's prefix, is of a 4-bit weight's state."""
    return key.startswith("weight.") and key.split(".")[1] in QuantState.valid_qs_keys


def parts_of(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The quantized parts of the weight of module `prefix`, by their keys in a checkpoint."""
    keys = [k for k in state_dict if k.startswith(prefix)]
    return {
        k.removeprefix(prefix): state_dict[k] for k in keys if is_quant_state_key(k[len(prefix) :])
    }


def _is_packed(key: str, value: object) -> bool:
    return "quant_state" in key and isinstance(value, Tensor)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
