"""Adapters merged into the weights, written as a model folder of floats or of 4-bit weights.

A merged weight is the 4-bit base's values plus the adapter's scaling * B A. In 16 or 32 bits it is
rounded once; quantized again, stochastically, it gets noise of some 2 % (requantize.py). The report
(merge_cost.py) tells what that costs. The model itself is the same afterwards.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_native import files
from qlora_native.experts import stored_shape, stored_stack
from qlora_native.functional import dequantize_4bit
from qlora_native.linear import Linear4bit
from qlora_native.loading.checkpoint_index import INDEX_FILE, SINGLE_FILE
from qlora_native.loading.checkpoint_names import CheckpointNames
from qlora_native.loading.quantized_folder import may_be_replaced, save_quantized
from qlora_native.loading.safetensors_io import shards, write_safetensors
from qlora_native.lora import QLoRALinear
from qlora_native.merge_cost import MergeReport, WeightCost, divergence, log_probabilities
from qlora_native.model import lora_layers, quantized_experts, quantized_layers
from qlora_native.module_tree import places, replace
from qlora_native.requantize import SeededGenerators

__all__ = ["PROMPTS", "MergeReport", "save_merged"]

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "Question: Why is the sky blue?\nAnswer:",
)
MAX_SHARD_BYTES = 2_000_000_000

Model = Any  # transformers.PreTrainedModel; transformers is optional and has no strict types


def save_merged(
    model: Model,
    tokenizer: Any,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
    rounding: str = "stochastic",
    prompts: Sequence[str] = PROMPTS,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> MergeReport:
    """Write the model with its adapters merged into `folder`, beside its place, then renamed.

    With a dtype it is an ordinary Hugging Face folder of that dtype. With None it is a quantized
    one (loading.save_quantized), each merged weight quantized again as its base is.

    Needs memory for one shard; to quantize, or to run prompts, for all merged weights as stored.

    Args:
        rounding: with None for dtype, as QLoRALinear.quantized_again has it.
        prompts: texts that the KL divergence is measured on; empty to leave it out.

    Raises:
        ValueError: the model has no adapters, or dtype cannot hold a merged weight.
        FileExistsError: `folder` holds something that is no model.
    """
    if not any(True for _ in lora_layers(model)):
        raise ValueError("the model has no adapters: there is nothing to merge")
    folder = Path(folder)
    if folder.exists() and not may_be_replaced(folder):
        raise FileExistsError(
            f"{folder} exists and is no model folder: choose another name or remove it"
        )
    inputs = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in prompts]
    adapted = log_probabilities(model, inputs)
    cost = WeightCost()
    if dtype is None:
        with _stored_layers(model, None, cost, rounding):
            found = divergence(adapted, log_probabilities(model, inputs))
            save_quantized(model, tokenizer, folder, max_shard_bytes=max_shard_bytes)
    else:
        found = divergence(adapted, adapted)
        if inputs:
            with _stored_layers(model, dtype, WeightCost()):
                found = divergence(adapted, log_probabilities(model, inputs))
        plan = _MergedTensors(model, dtype, cost)
        files.write_folder(folder, lambda new: _fill(new, plan, tokenizer, max_shard_bytes))
    return cost.report(*found)


# ---- the layers as they will be stored ----------------------------------------------------------


class _RoundedLinear(nn.Module):
    """A linear whose weight is rounded to a dtype while its activations keep their own."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


@contextmanager
def _stored_layers(
    model: Model, dtype: torch.dtype | None, cost: WeightCost, rounding: str = "stochastic"
) -> Iterator[None]:
    """Within it, the model's 4-bit layers are what the folder will hold of them."""
    names_of = places(model)
    originals = dict(quantized_layers(model))
    generators = SeededGenerators()
    try:
        for name, layer in originals.items():
            if dtype is not None:
                stored: nn.Module = _RoundedLinear(_merged(layer, dtype), layer.bias)
            elif isinstance(layer, QLoRALinear):
                stored = _quantized_again(name, layer, cost, rounding, generators)
            else:
                continue
            replace(model, names_of[name], layer, stored)
        yield
    finally:
        for name, layer in originals.items():
            replace(model, names_of[name], model.get_submodule(name), layer)


def _quantized_again(
    name: str, layer: QLoRALinear, cost: WeightCost, rounding: str, generators: SeededGenerators
) -> Linear4bit:
    try:
        packed, state = layer.quantized_again(rounding, generators[layer.weight.device])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    cost.add(name, layer, layer.merged_weight(), dequantize_4bit(packed, state, torch.float32))
    new = Linear4bit.from_tensors(packed, state, layer.bias)
    new.fan_in_fan_out = layer.fan_in_fan_out
    return new


def _merged(layer: Linear4bit, dtype: torch.dtype) -> Tensor:
    if isinstance(layer, QLoRALinear):
        return layer.merged_weight(dtype)
    return layer.dequantize(dtype)


# ---- a folder of floats -------------------------------------------------------------------------


class _MergedTensors:
    """The merged model's tensors by name: their shapes at once, their values one by one."""

    def __init__(self, model: Model, dtype: torch.dtype, cost: WeightCost) -> None:
        self.model = model
        self.dtype = dtype
        self.cost = cost
        self.layers = dict(quantized_layers(model))
        self.others: dict[str, Tensor] = {}
        self.stacks = {
            f"{name}.{stack}": layer
            for name, experts in quantized_experts(model)
            for stack, layer in experts.stacks()
        }
        packed = tuple(f"{name}." for name in (*self.layers, *self.stacks))
        seen: set[int] = set()
        for name, tensor in model.state_dict().items():
            if name in self.stacks or name.startswith(packed):
                continue
            if tensor.numel() and tensor.data_ptr() in seen:
                continue  # tied weights are written once; loading ties them again
            seen.add(tensor.data_ptr())
            self.others[name] = tensor

    def outline(self) -> dict[str, Tensor]:
        """All tensors, on the meta device, in their stored shape and dtype."""
        outline = {name: self._cast(tensor.to("meta")) for name, tensor in self.others.items()}
        for name, layer in self.layers.items():
            shape = (layer.out_features, layer.in_features)
            shape = shape[::-1] if layer.fan_in_fan_out else shape
            outline[f"{name}.weight"] = torch.empty(shape, dtype=self.dtype, device="meta")
            if layer.bias is not None:
                outline[f"{name}.bias"] = self._cast(layer.bias.detach().to("meta"))
        for name, stack in self.stacks.items():
            outline[name] = torch.empty(stored_shape(stack), dtype=self.dtype, device="meta")
        return outline

    def value(self, name: str) -> Tensor:
        """The tensor of this name, in its stored form."""
        if name in self.others:
            return self._cast(self.others[name])
        if name in self.stacks:
            return stored_stack(self.stacks[name], self.dtype)
        owner, _, leaf = name.rpartition(".")
        layer = self.layers[owner]
        if leaf == "bias":
            assert layer.bias is not None
            return self._cast(layer.bias.detach())
        weight = _merged(layer, torch.float32)
        stored = weight.to(self.dtype)
        if not bool(torch.isfinite(stored).all()):
            raise ValueError(
                f"{name}: {int((~torch.isfinite(stored)).sum())} merged values are not finite in "
                f"{self.dtype} (largest: {weight.abs().max().item():.3g}); choose torch.bfloat16 "
                "or torch.float32"
            )
        if isinstance(layer, QLoRALinear):
            self.cost.add(owner, layer, weight, stored)
        return stored.T.contiguous() if layer.fan_in_fan_out else stored

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def _fill(folder: Path, tensors: _MergedTensors, tokenizer: Any, max_shard_bytes: int) -> None:
    model = tensors.model
    _write_weights(folder, tensors, max_shard_bytes)
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = tensors.dtype
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _write_weights(folder: Path, tensors: _MergedTensors, max_shard_bytes: int) -> None:
    names = CheckpointNames(tensors.model, tensors.outline())
    outline = names.outline
    parts = list(shards(outline, max_shard_bytes))

    def values(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: names.value(name, tensors.value) for name in part}

    if len(parts) == 1:
        write_safetensors(folder / SINGLE_FILE, values(parts[0]))
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file_name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_safetensors(folder / file_name, values(part))
        weight_map.update(dict.fromkeys(part, file_name))
    total = sum(tensor.numel() * tensor.element_size() for tensor in outline.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")
