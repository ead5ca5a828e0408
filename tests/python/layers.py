"""Layers for the tests, what they compute by the reference, and how near one comes to it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora_native import reference
from qlora_native.nn import Linear4bit, QLoRALinear

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DOUBLE = pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
KINDS = pytest.mark.parametrize("kind", [Linear4bit, QLoRALinear], ids=lambda kind: kind.__name__)

# Error of a product of K ~ 100 values of size 1, relative to the result: eps of the dtype by 4.
RTOL = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def make_layer(kind=Linear4bit, n=48, k=96, **options):
    torch.manual_seed(0)
    layer = kind(k, n, **options)
    if kind is QLoRALinear:
        nn.init.normal_(layer.lora_B, std=0.1)
    return layer


def assert_close(got, want, dtype=torch.float32):
    want = want.detach().double()
    error = (got.detach().double() - want).norm() / want.norm().clamp(min=1e-30)
    assert error < RTOL[dtype], f"relative error {error:.2e}"


def want_of(layer, x):
    """What the layer computes, by the reference."""
    w = layer.dequantize(torch.float32)
    if isinstance(layer, QLoRALinear):
        return reference.qlora_linear(x, w, layer.bias, layer.lora_A, layer.lora_B, layer.scaling)
    return reference.linear(x, w, layer.bias)
