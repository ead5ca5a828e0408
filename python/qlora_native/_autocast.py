"""The ops under torch.autocast: what is multiplied is cast, the weight's scales never.

torch's own rule for a matrix product casts every floating argument, which would round the scales;
and what it leaves alone, float64, is left alone here too. lora_a and lora_b are read in the dtype
they have. The gradients' ops have no rule: a backward pass keeps its forward pass's dtypes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from qlora_native import _load as _load

DEVICES = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
# op -> what is cast, by position: x, and bias where there is one
CAST: dict[str, tuple[int, ...]] = {
    "grouped_linear_4bit": (0,),
    "linear_4bit": (0, 8),
    "qlora_linear": (0, 7),
}


def lowered(x: Tensor) -> Tensor:
    """x in autocast's dtype, where autocast is on for its device."""
    device = x.device.type
    if device not in DEVICES or not torch.is_autocast_enabled(device):
        return x
    return cast(Tensor, _lower(x, torch.get_autocast_dtype(device)))


def _lower(value: Any, dtype: torch.dtype) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value if value.dtype == torch.float64 else value.to(dtype)


def _casting(op: Any, positions: tuple[int, ...], device: str, key: str) -> Callable[..., Any]:
    keys: Any = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    exclude: Any = torch._C._ExcludeDispatchKeyGuard

    def call(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        with exclude(keys):
            return op(*(_lower(a, dtype) if i in positions else a for i, a in enumerate(args)))

    return call


_new_library: Any = torch.library.Library
_libraries = {key: _new_library("qlora_native", "IMPL", key) for key in DEVICES.values()}


def _register() -> None:
    for name, positions in CAST.items():
        op = getattr(torch.ops.qlora_native, name).default
        for device, key in DEVICES.items():
            _libraries[key].impl(name, _casting(op, positions, device, key))


_register()
