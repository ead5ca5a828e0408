"""bitsandbytes.utils, as far as 4-bit programs use it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native.bitsandbytes._missing import LLM_INT8, attributes

__getattr__ = attributes(
    __name__,
    {
        "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING": LLM_INT8,
        "LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING": LLM_INT8,
        "OutlierTracer": LLM_INT8,
        "execute_and_return": "it runs a shell command, which no layer needs",
        "find_outlier_dims": LLM_INT8,
        "outlier_hook": LLM_INT8,
    },
)


def pack_dict_to_tensor(source_dict: dict[str, Any]) -> Tensor:
    """The dictionary as UTF-8 JSON in a uint8 tensor [n], as safetensors can hold it."""
    text = json.dumps(source_dict).encode("utf-8")
    return torch.tensor(list(text), dtype=torch.uint8, device="cpu")


def unpack_tensor_to_dict(tensor_data: Tensor) -> dict[str, Any]:
    """What pack_dict_to_tensor was given."""
    unpacked: dict[str, Any] = json.loads(bytes(tensor_data.tolist()).decode("utf-8"))
    return unpacked


def replace_linear(
    model: nn.Module,
    linear_replacement: Callable[[int, int, bool], nn.Module],
    skip_modules: Sequence[str] = ("lm_head",),
    copy_weights: bool = False,
    post_processing_function: str | None = None,
) -> nn.Module:
    """Put linear_replacement(in_features, out_features, has_bias) in the place of each nn.Linear.

    Args:
        skip_modules: names, the last part of their path, of linears that stay.
        copy_weights: give the new module the old one's weight and bias.
        post_processing_function: name of a method of the old module, called with it at last.
    """
    for name, module in model.named_children():
        replace_linear(
            module, linear_replacement, skip_modules, copy_weights, post_processing_function
        )
        if not isinstance(module, nn.Linear) or name in skip_modules:
            continue
        new = linear_replacement(module.in_features, module.out_features, module.bias is not None)
        if copy_weights:
            new.weight, new.bias = module.weight, module.bias
        setattr(model, name, new)
        if post_processing_function is not None:
            after = getattr(module, post_processing_function, None)
            if after is not None:
                after(module)
    return model


def sync_gpu(t: Tensor) -> None:
    """Wait for the device of `t`."""
    if t.device.type == "cuda":
        torch.cuda.synchronize(t.device)
