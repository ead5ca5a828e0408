"""How a model's linears are to be quantized, and how a folder says that they have been."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class QuantSettings:
    """How `model.quantize` is to treat a model."""

    format: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    skip: tuple[str, ...] = ("lm_head",)
    requantize: bool = False  # weights that GPTQ or AWQ has rounded once already


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
