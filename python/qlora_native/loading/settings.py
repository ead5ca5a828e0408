"""How a model's linears are to be quantized, and how a folder says that they already are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qlora_native.loading.errors import CheckpointError


@dataclass(frozen=True)
class QuantSettings:
    """How `model.quantize` is to treat a model."""

    format: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    skip: tuple[str, ...] = ("lm_head",)


def check_stored_quantization(quantization: dict[str, Any] | Any | None, where: str) -> bool:
    """Whether `quantization_config` is bitsandbytes' 4-bit form; False where it is absent."""
    if not quantization:
        return False
    values = quantization if isinstance(quantization, dict) else quantization.to_dict()
    method = str(
        values.get("quant_method", "bitsandbytes" if "load_in_4bit" in values else "unknown")
    )
    if method == "bitsandbytes" and values.get("load_in_4bit"):
        return True
    kind = "8-bit bitsandbytes" if method == "bitsandbytes" else method.upper()
    raise CheckpointError(
        f"{where} is already quantized by {kind}, which cannot be read: only bitsandbytes' 4-bit "
        "form can; "
        "take the original, un-quantized model, which is quantized while it loads"
    )


def bitsandbytes_config(settings: QuantSettings, dtype: torch.dtype) -> dict[str, Any]:
    """`quantization_config` as transformers writes it for bitsandbytes' 4-bit models."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": settings.format,
        "bnb_4bit_use_double_quant": settings.double_quant,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": list(settings.skip),
    }
