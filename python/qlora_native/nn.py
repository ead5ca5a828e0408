"""Modules: `Linear4bit`, a frozen linear in 4 bits, and `QLoRALinear`, the same with an adapter."""

from qlora_native.linear import Linear4bit
from qlora_native.lora import QLoRALinear

__all__ = ["Linear4bit", "QLoRALinear"]
