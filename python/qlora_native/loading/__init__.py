"""Loading: from a folder or a GGUF file to a 4-bit model and its tokenizer, in one call."""

from __future__ import annotations

from qlora_native.loading.errors import CheckpointError
from qlora_native.loading.load import load_model
from qlora_native.loading.precision import activation_dtype
from qlora_native.loading.quantized_folder import save_quantized

__all__ = ["CheckpointError", "activation_dtype", "load_model", "save_quantized"]
