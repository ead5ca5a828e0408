"""QLoRA on native kernels: 4-bit frozen weights, LoRA adapters, 8-bit optimizers.

Importing this package registers the ops (`torch.ops.qlora_native.*`) with fakes, gradients and
rules for autocast and vmap. Everything else is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qlora_native import _autocast as _autocast
from qlora_native import _fake as _fake
from qlora_native import _inplace as _inplace
from qlora_native import _vmap as _vmap
from qlora_native import autograd as autograd
from qlora_native import ops as ops
from qlora_native._core import available_isas, codebook, cpu_isa, dynamic_map, force_isa
from qlora_native.tuned_ways import build_info, when_cuda_starts

if TYPE_CHECKING:
    from qlora_native import bitsandbytes as bitsandbytes
    from qlora_native import functional as functional
    from qlora_native import nn as nn
    from qlora_native import optim as optim
    from qlora_native.adapter import load_adapter, save_adapter
    from qlora_native.loading import load_model, save_quantized
    from qlora_native.merging import save_merged
    from qlora_native.model import add_lora, merge, quantize, unmerge
    from qlora_native.quant_state import QuantState
    from qlora_native.standin import install_as_bitsandbytes
    from qlora_native.tuning import tune

__version__ = "0.1.0"

# name -> the module that has it
_LAZY = {
    "QuantState": "quant_state",
    "add_lora": "model",
    "install_as_bitsandbytes": "standin",
    "load_adapter": "adapter",
    "load_model": "loading",
    "merge": "model",
    "quantize": "model",
    "save_adapter": "adapter",
    "save_merged": "merging",
    "save_quantized": "loading",
    "tune": "tuning",
    "unmerge": "model",
}
_LAZY_MODULES = ("bitsandbytes", "functional", "nn", "optim")

__all__ = [
    "QuantState",
    "add_lora",
    "available_isas",
    "bitsandbytes",
    "build_info",
    "codebook",
    "cpu_isa",
    "dynamic_map",
    "force_isa",
    "functional",
    "install_as_bitsandbytes",
    "load_adapter",
    "load_model",
    "merge",
    "nn",
    "ops",
    "optim",
    "quantize",
    "save_adapter",
    "save_merged",
    "save_quantized",
    "tune",
    "unmerge",
]

when_cuda_starts()


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return importlib.import_module(f"qlora_native.{name}")
    if name in _LAZY:
        value = getattr(importlib.import_module(f"qlora_native.{_LAZY[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'qlora_native' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_LAZY_MODULES})
