"""Our quantized folder: a Hugging Face folder whose packed weights bear bitsandbytes' keys.

So transformers with bitsandbytes loads it as well as `load_model` does. It is written beside its
final place and renamed, so that a reader sees the old folder or the new one, and a full disk leaves
the old one untouched.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_native import files
from qlora_native.linear import Linear4bit
from qlora_native.loading.checkpoint_index import INDEX_FILE, SINGLE_FILE
from qlora_native.loading.safetensors_io import shards, write_safetensors
from qlora_native.loading.settings import QuantSettings, bitsandbytes_config
from qlora_native.loading.skeleton import Model
from qlora_native.lora import QLoRALinear

MAX_SHARD_BYTES = 5_000_000_000


def save_quantized(
    model: Model, tokenizer: Any, folder: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Path:
    """Write `model` (with Linear4bit layers) and its tokenizer to `folder`; return its path.

    The folder holds config.json with bitsandbytes' `quantization_config`, safetensors, and the
    tokenizer's files with its chat template. An existing folder is replaced only if it is empty or
    a model folder itself.

    Raises ValueError if no layer of the model is quantized, FileExistsError if `folder` holds
    something else.
    """
    settings = settings_of(model)
    folder = Path(folder)
    if folder.exists() and not may_be_replaced(folder):
        raise FileExistsError(
            f"{folder} exists and is no model folder: choose another name or remove it"
        )
    files.write_folder(folder, lambda new: fill(new, model, tokenizer, settings, max_shard_bytes))
    return folder


def fill(
    folder: Path,
    model: Model,
    tokenizer: Any,
    settings: QuantSettings,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write everything that a quantized folder holds into `folder`."""
    _write_weights(folder, model, max_shard_bytes)
    _write_config(folder, model, settings)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def settings_of(model: Model) -> QuantSettings:
    """The settings that describe the model's 4-bit layers; other linears are its `skip`."""
    if any(isinstance(module, QLoRALinear) for module in model.modules()):
        raise ValueError(
            "the model bears adapters: save them by save_adapter, or merge them into the weights, "
            "before it is saved as a quantized folder"
        )
    quantized = [module for module in model.modules() if isinstance(module, Linear4bit)]
    if not quantized:
        raise ValueError(
            "the model has no 4-bit layer: quantize it before it is saved as a quantized folder"
        )
    state = quantized[0].quant_state
    skip = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and not isinstance(module, Linear4bit)
    }
    return QuantSettings(state.format, state.blocksize, state.double_quant, tuple(sorted(skip)))


def may_be_replaced(folder: Path) -> bool:
    return folder.is_dir() and ((folder / "config.json").is_file() or not any(folder.iterdir()))


def _write_weights(folder: Path, model: Model, max_shard_bytes: int) -> None:
    tensors = _without_duplicates(model.state_dict())
    parts = list(shards(tensors, max_shard_bytes))
    if len(parts) == 1:
        write_safetensors(folder / SINGLE_FILE, tensors)
        return
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        file_name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_safetensors(folder / file_name, part)
        weight_map.update(dict.fromkeys(part, file_name))
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _without_duplicates(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One name for each storage: tied weights are written once; loading ties them again."""
    seen: set[int] = set()
    unique = {}
    for name, tensor in state.items():
        if tensor.numel() == 0 or tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            unique[name] = tensor
    return unique


def _write_config(folder: Path, model: Model, settings: QuantSettings) -> None:
    config = model.config.to_dict()
    dtype = model.get_input_embeddings().weight.dtype
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["architectures"] = [type(model).__name__]
    config["quantization_config"] = bitsandbytes_config(settings, dtype)
    config.pop("_name_or_path", None)
    text = json.dumps(config, indent=2, sort_keys=True, default=str)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
