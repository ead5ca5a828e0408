"""transformers' from_pretrained with our 4-bit layers: importing this module registers with it.

    from qlora_native.integrations.transformers import QLoRANativeConfig
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=QLoRANativeConfig())

`folder` may hold floats, which are quantized as they are read, one at a time; what save_pretrained
wrote of such a model; or what bitsandbytes' 4-bit layers were saved in, which is used as it is and
saved as it was. `handle_bitsandbytes` puts our layers where BitsAndBytesConfig asks for 4 bits.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from qlora_native.integrations.config import METHOD, BitsAndBytesFolder, QLoRANativeConfig
from qlora_native.integrations.quantizer import BitsAndBytesQuantizer, QLoRANativeQuantizer
from qlora_native.integrations.versions import check

__all__ = ["QLoRANativeConfig", "QLoRANativeQuantizer", "handle_bitsandbytes", "register"]

_BITSANDBYTES = "bitsandbytes_4bit"


def register() -> None:
    """Let transformers find the config. Importing this module does it; a second time is nothing."""
    check("transformers")
    if METHOD in AUTO_QUANTIZATION_CONFIG_MAPPING:
        return
    register_quantization_config(METHOD)(QLoRANativeConfig)
    register_quantizer(METHOD)(QLoRANativeQuantizer)
    AutoHfQuantizer.merge_quantization_configs = staticmethod(
        _taking_bitsandbytes_folders(AutoHfQuantizer.merge_quantization_configs)
    )


def handle_bitsandbytes(on: bool = True) -> None:
    """From now on BitsAndBytesConfig(load_in_4bit=True), and folders that have it, mean our layers.

    Scripts and folders stay as they are; the package bitsandbytes is not needed. On a CPU the
    codes are bitsandbytes', those of double-quantized scales too. With on=False it is as before.
    """
    AUTO_QUANTIZER_MAPPING[_BITSANDBYTES] = BitsAndBytesQuantizer if on else Bnb4BitHfQuantizer


def _taking_bitsandbytes_folders(merge: Any) -> Any:
    """transformers' merge of the folder's config with the caller's, which must be of one class.

    A QLoRANativeConfig is taken with a folder of bitsandbytes' 4-bit layers too.
    """

    @functools.wraps(merge)
    def with_bitsandbytes(stored: Any, given: Any) -> Any:
        if not isinstance(given, QLoRANativeConfig):
            return merge(stored, given)
        values = stored if isinstance(stored, dict) else stored.to_dict()
        if values.get("quant_method", "bitsandbytes") == "bitsandbytes" and values.get(
            "load_in_4bit"
        ):
            return BitsAndBytesFolder(values, given.compute_dtype)
        if values.get("quant_method") != METHOD:
            raise ValueError(
                f"the folder is quantized by {values.get('quant_method')}, and quantizing it again "
                "compounds the loss: take the original, un-quantized model, or leave "
                "quantization_config out to load it as it is"
            )
        return merge(stored, given)

    return with_bitsandbytes


register()
