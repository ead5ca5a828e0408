"""`LoadedLinear4bit`: a Linear4bit as a checkpoint and its config have it.

Beyond a Linear4bit it has the dtype to compute in, and saves what it was loaded from byte for byte:
bitsandbytes' packed codes may be viewed as another dtype (its quant_storage), and older versions
wrote maps that differ in the last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_native import bnb_keys
from qlora_native.linear import Linear4bit
from qlora_native.quant_state import QuantState


@dataclass(frozen=True)
class StoredForm:
    """What a checkpoint wrote of a weight otherwise than bnb_keys.write would."""

    dtype: torch.dtype  # that the packed codes are viewed as
    shape: torch.Size
    parts: dict[str, Tensor]  # name after "weight." -> the tensor as it was

    @classmethod
    def of(cls, weight: Tensor, parts: Mapping[str, Tensor], state: QuantState) -> StoredForm:
        """`weight` as stored; `parts`, the other keys, by their names after "weight."."""
        ours = bnb_keys.write(state, "")
        other = {name: part for name, part in parts.items() if not _same(part, ours[name])}
        return cls(weight.dtype, weight.shape, other)


class LoadedLinear4bit(Linear4bit):
    """A Linear4bit that computes in compute_dtype (None: its input's), in and out as the input is.

    `from_base` makes one of a Linear4bit, whose tensors it uses. Weights that are quantized anew
    are saved in the usual form. peft's adapters compute in compute_dtype too, those of
    qlora_native.add_lora in their input's.
    """

    compute_dtype: torch.dtype | None = None
    stored: StoredForm | None = None

    @classmethod
    def from_base(
        cls,
        base: Linear4bit,
        compute_dtype: torch.dtype | None = None,
        stored: StoredForm | None = None,
    ) -> LoadedLinear4bit:
        layer = cls.__new__(cls)
        layer._init_as(base)
        layer.compute_dtype = compute_dtype
        layer.stored = stored
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in x's dtype, or in autocast's under it."""
        if self.compute_dtype is None:
            return super().forward(x)
        return super().forward(x.to(self.compute_dtype)).to(x.dtype)

    def _set_quantized(self, packed: Tensor, state: QuantState) -> None:
        super()._set_quantized(packed, state)
        self.stored = None

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.stored is not None and not self.weight.is_meta:
            as_stored = self.weight.view(-1).view(self.stored.dtype).view(self.stored.shape)
            destination[prefix + "weight"] = as_stored
            for name, part in self.stored.parts.items():
                destination[f"{prefix}weight.{name}"] = part


def _same(a: Tensor, b: Tensor) -> bool:
    """To the bit, as a NaN in a map would be."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.cpu().view(-1).view(torch.uint8), b.cpu().view(-1).view(torch.uint8))
