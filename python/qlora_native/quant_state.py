"""What turns packed 4-bit codes back into values: scales and layout.

A `QuantState` holds the scales as plain tensors, so it moves between devices, pickles, deep-copies
and goes through safetensors like any other tensors. bnb_keys.py has its form in a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

FORMATS = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(eq=False)
class QuantState:
    """Scales and layout of one 4-bit tensor.

    absmax         fp32 [n_blocks]; uint8 codes of the signed dynamic map when double-quantized
    shape, dtype   of the tensor that was quantized
    blocksize      values that share a scale: a power of two, 32 to 4096
    format         "nf4" or "fp4"
    nested_absmax  fp32 [ceil(n_blocks/256)], double-quantized only, as the next
    nested_offset  fp32 [1], the mean of the scales

    Raises ValueError or TypeError when the parts do not fit together.
    """

    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int
    format: str
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None

    def __post_init__(self) -> None:
        self.shape = torch.Size(self.shape)
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {FORMATS}, got {self.format!r}")
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {self.blocksize!r}")
        if self.dtype not in WEIGHT_DTYPES:
            raise TypeError(f"dtype must be one of {WEIGHT_DTYPES}, got {self.dtype}")
        if (self.nested_absmax is None) != (self.nested_offset is None):
            raise ValueError("nested_absmax and nested_offset must be given together or not at all")
        scale_dtype = torch.uint8 if self.double_quant else torch.float32
        _require(self.absmax, "absmax", scale_dtype, self.n_blocks)
        if self.nested_absmax is not None and self.nested_offset is not None:
            n_nested = -(-self.n_blocks // NESTED_BLOCKSIZE)
            _require(self.nested_absmax, "nested_absmax", torch.float32, n_nested)
            _require(self.nested_offset, "nested_offset", torch.float32, 1)

    @property
    def double_quant(self) -> bool:
        """Whether the scales are themselves quantized."""
        return self.nested_absmax is not None

    @property
    def n_blocks(self) -> int:
        """Number of scales."""
        return -(-self.shape.numel() // self.blocksize)

    @property
    def packed_shape(self) -> tuple[int, int]:
        """Shape of the packed codes: two to a byte."""
        return (-(-self.shape.numel() // 2), 1)

    @property
    def device(self) -> torch.device:
        """Where the scales are."""
        return self.absmax.device

    @property
    def nbytes(self) -> int:
        """Bytes held by the scales (not by the packed codes)."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors held, by field name."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in held.items() if isinstance(value, Tensor)}

    def to(
        self, device: torch.device | str, non_blocking: bool = False, copy: bool = False
    ) -> QuantState:
        """This state with its tensors on `device`; dtypes never change."""
        moved: dict[str, Any] = {
            name: tensor.to(device, non_blocking=non_blocking, copy=copy)
            for name, tensor in self.tensors().items()
        }
        return replace(self, **moved)

    def __eq__(self, other: object) -> bool:
        """Same layout and the same scales to the bit (a NaN equals itself)."""
        if not isinstance(other, QuantState):
            return NotImplemented
        mine, others = self.tensors(), other.tensors()
        layout = ("shape", "dtype", "blocksize", "format")
        return (
            all(getattr(self, name) == getattr(other, name) for name in layout)
            and mine.keys() == others.keys()
            and all(_same_bits(mine[name], others[name]) for name in mine)
        )

    __hash__ = None  # type: ignore[assignment]

    def check_packed(self, packed: Tensor, name: str = "packed") -> Tensor:
        """`packed` as uint8 [ceil(n/2), 1]; any storage dtype viewing the same bytes is taken.

        Raises ValueError when it holds another number of bytes than the shape asks for.
        """
        wanted = self.packed_shape[0]
        if packed.nbytes != wanted:
            raise ValueError(
                f"{name} must hold {wanted} bytes for shape {list(self.shape)} at 4 bits a value, "
                f"got {packed.nbytes} bytes ({packed.dtype} {list(packed.shape)})"
            )
        if packed.dtype == torch.uint8 and packed.shape == (wanted, 1) and packed.is_contiguous():
            return packed
        return packed.contiguous().view(-1).view(torch.uint8).view(wanted, 1)

    def to_bnb_dict(self, prefix: str = "weight.") -> dict[str, Tensor]:
        """The state under bitsandbytes' keys (bnb_keys.write), without the packed codes."""
        from qlora_native import bnb_keys

        return bnb_keys.write(self, prefix)

    @staticmethod
    def from_bnb_dict(tensors: Mapping[str, Tensor], prefix: str = "weight.") -> QuantState:
        """The state read from bitsandbytes' keys (bnb_keys.read); other keys are ignored."""
        from qlora_native import bnb_keys

        return bnb_keys.read(tensors, prefix)


def _require(tensor: Tensor, name: str, dtype: torch.dtype, numel: int) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tuple(tensor.shape) != (numel,):
        raise ValueError(f"{name} must have shape [{numel}], got {list(tensor.shape)}")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.to(a.device).contiguous().view(torch.uint8)
    )
