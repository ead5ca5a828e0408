"""LoftQ for peft's adapters on 4-bit layers: they begin with what quantizing took away.

Li et al., 2023, with one alternating step, as peft's function of the same name has it for
bitsandbytes: B A is the best approximation of rank r of W - W4 (Frobenius), shared out evenly, so
that W4 + B A, with a scaling of 1, is nearer to W than W4 is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from qlora_native.integrations.peft import LoraLinear4bit
from qlora_native.loading.checkpoint_index import CheckpointIndex

_PREFIX = "base_model.model."


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    folder: str | Path,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> list[str]:
    """Replace lora_A and lora_B of every 4-bit layer by LoftQ's, and return the layers' names.

    Args:
        folder: of the un-quantized model, with safetensors; one weight is read at a time.
        callback: is told the model and a layer's name after each replacement; where it answers
            False, the layer's adapter is put back as it was.

    Raises:
        ValueError: no layer bears that adapter on 4-bit weights, or the folder has no weight for
            one that does (CheckpointError, which names the file).
    """
    layers = {
        name.removeprefix(_PREFIX): layer
        for name, layer in peft_model.named_modules()
        if isinstance(layer, LoraLinear4bit) and adapter_name in layer.lora_A
    }
    if not layers:
        raise ValueError(f"no 4-bit layer of the model has an adapter {adapter_name!r}")
    replaced = []
    with CheckpointIndex(Path(folder)) as index:
        known = set(index.names())
        for name, layer in layers.items():
            if f"{name}.weight" not in known:
                raise ValueError(f"{folder} holds no {name}.weight: is it of another model?")
            adapter = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
            before = [parameter.clone() for parameter in adapter]
            weight = index.read(f"{name}.weight").to(layer.base_layer.weight.device)
            for parameter, value in zip(adapter, _loftq(layer, weight, adapter_name), strict=True):
                parameter.copy_(value)
            if callback is None or callback(peft_model, name):
                replaced.append(name)
                continue
            for parameter, value in zip(adapter, before, strict=True):
                parameter.copy_(value)
    return replaced


def _loftq(
    layer: LoraLinear4bit, weight: torch.Tensor, adapter_name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in_features] and B [out_features, r] with B A ~ weight - its 4-bit form."""
    base = layer.base_layer
    weight = weight.float().T if base.fan_in_fan_out else weight.float()
    u, s, vh = torch.linalg.svd(weight - base.dequantize(torch.float32), full_matrices=False)
    r = layer.r[adapter_name]
    root = s[:r].sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root
