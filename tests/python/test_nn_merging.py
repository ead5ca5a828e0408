"""Adapters merged into their layer and taken out again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from layers import DOUBLE, assert_close, make_layer
from qlora_native import reference
from qlora_native.functional import dequantize_4bit, quantize_4bit
from qlora_native.nn import QLoRALinear


@DOUBLE
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_merge_then_unmerge_restores_every_bit(double_quant, options):
    layer = make_layer(QLoRALinear, double_quant=double_quant, **options)
    x = torch.randn(3, 96)
    before, state = layer(x), copy.deepcopy(layer.state_dict())
    layer.merge("nearest")
    assert layer.merged
    merged = layer(x)
    want = quantize_4bit(layer.merged_weight(), double_quant=double_quant)
    assert torch.equal(layer.merged_packed, want[0]) and layer.merged_state == want[1]
    assert not torch.equal(merged, before)
    assert_close(merged, reference.linear(x, dequantize_4bit(*want, torch.float32), layer.bias))
    after = layer.state_dict()
    assert all(torch.equal(state[key], after[key]) for key in state) and len(after) == len(state)
    layer.unmerge()
    assert not layer.merged and torch.equal(layer(x), before)


@DOUBLE
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_stochastic_merging_keeps_the_adapter_on_average(double_quant, format):
    layer = make_layer(
        QLoRALinear, n=33, k=95, blocksize=32, double_quant=double_quant, format=format
    )
    with torch.no_grad():
        layer.lora_B.mul_(0.01)
        change = layer.merged_weight() - layer.dequantize()
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(200):
        layer.merge(generator=generator)
        stored = dequantize_4bit(layer.merged_packed, layer.merged_state, torch.float32)
        found.append(stored - layer.dequantize())
        layer.unmerge()
    kept = [((got * change).sum() / change.square().sum()).item() for got in found]
    assert sum(kept) / 200 == pytest.approx(1, abs=0.1)
    mean = torch.stack(found).mean(0)
    assert (mean - change).norm() < 0.2 * torch.stack(found).std(0).norm()
    nearest = dequantize_4bit(*layer.quantized_again("nearest"), torch.float32)
    lost = ((nearest - layer.dequantize()) * change).sum() / change.square().sum()
    assert lost < 0.5


def test_stochastic_merging_is_a_function_of_the_seed_and_leaves_zero_changes():
    layer = make_layer(QLoRALinear)
    first, again = layer.quantized_again()[0], layer.quantized_again()[0]
    other = layer.quantized_again(generator=torch.Generator().manual_seed(2))[0]
    assert torch.equal(first, again) and not torch.equal(first, other)
    nn.init.zeros_(layer.lora_B)
    packed, state = layer.quantized_again()
    assert torch.equal(packed, layer.weight) and state == layer.quant_state
    with pytest.raises(ValueError, match="rounding must be 'stochastic' or 'nearest', got 'up'"):
        layer.merge("up")
    nn.init.constant_(layer.lora_A, torch.nan)
    with pytest.raises(ValueError, match="must be finite, got NaN or Inf in the adapter"):
        layer.merge()


def test_loading_a_state_dict_drops_the_merged_copy():
    layer, other = make_layer(QLoRALinear), make_layer(QLoRALinear)
    other.reset_parameters()
    layer.merge()
    layer.load_state_dict(other.state_dict())
    assert not layer.merged
    x = torch.randn(2, 96)
    assert torch.equal(layer(x), other(x))


def test_disabled_adapter_is_the_base():
    layer = make_layer(QLoRALinear)
    x = torch.randn(2, 96)
    layer.adapter_enabled = False
    assert torch.equal(layer(x), layer.base()(x))
