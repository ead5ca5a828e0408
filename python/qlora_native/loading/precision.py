"""The dtype of activations, chosen for the processor."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from qlora_native import cpu_isa

Precision = Literal["auto", "float32", "bfloat16", "float16"]


def activation_dtype(precision: str = "auto") -> torch.dtype:
    """The torch dtype that `precision` names.

    "auto" is bfloat16 where the processor multiplies in it, else float32.

    Without such instructions 16-bit activations save little memory and no time.
    """
    if precision == "auto":
        return torch.bfloat16 if cpu_isa() == "avx512bf16" else torch.float32
    if precision not in get_args(Precision):
        raise ValueError(
            f"dtype must be one of {', '.join(get_args(Precision))}, got {precision!r}"
        )
    dtype: torch.dtype = getattr(torch, precision)
    return dtype
