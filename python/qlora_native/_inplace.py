"""Tells autograd which tensors the in-place ops wrote.

torch counts the writes to a tensor, and a backward pass that finds a saved tensor written since
then stops. Ops from C++ are not counted by themselves: without this, a backward pass after an
optimizer's step would silently use the new parameters in the old graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qlora_native import _load as _load

# op.overload -> its written arguments, by position or by name; lists of tensors too
WRITTEN: dict[str, tuple[int | str, ...]] = {
    "quantize_4bit.out": ("packed", "absmax"),
    "dequantize_4bit.out": ("out",),
    "quantize_8bit.out": ("codes", "absmax"),
    "dequantize_8bit.out": ("out",),
    "linear_4bit.out": ("out",),
    "adamw_step.default": (0, 2, 3),
    "adamw_8bit_step.default": (0, 2, 3, 4, 5),
    "lion_step.default": (0, 2),
    "lion_8bit_step.default": (0, 2, 3),
    "sgd_step.default": (0, 2),
    "sgd_8bit_step.default": (0, 2, 3),
}

_new_library: Any = torch.library.Library
_library: Any = _new_library("qlora_native", "IMPL", "ADInplaceOrView")


def _counting(op: Any, written: tuple[int | str, ...]) -> Callable[..., None]:
    after: Any = torch._C._after_ADInplaceOrView_keyset
    count = torch.autograd.graph.increment_version

    def call(keyset: Any, *args: Any, **kwargs: Any) -> None:
        op.redispatch(keyset & after, *args, **kwargs)
        for key in written:
            count(args[key] if isinstance(key, int) else kwargs[key])

    return call


def _register() -> None:
    for name, written in WRITTEN.items():
        op_name, overload = name.split(".")
        op = getattr(getattr(torch.ops.qlora_native, op_name), overload)
        full_name = op_name if overload == "default" else name
        _library.impl(full_name, _counting(op, written), with_keyset=True)


_register()
