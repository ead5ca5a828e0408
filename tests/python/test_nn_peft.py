"""QLoRALinear against PEFT's LoRA and DoRA over the same base."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from layers import assert_close, make_layer
from qlora_native.nn import QLoRALinear


def peft_twin(layer, **config):
    """PEFT's LoRA over the same base, dequantized, with the same adapter."""
    peft = pytest.importorskip("peft")
    base = nn.Linear(layer.in_features, layer.out_features)
    with torch.no_grad():
        base.weight.copy_(layer.dequantize(torch.float32))
        base.bias.copy_(layer.bias)
    lora = peft.LoraConfig(
        r=layer.r,
        lora_alpha=layer.alpha,
        use_rslora=layer.use_rslora,
        use_dora=layer.use_dora,
        target_modules=["0"],
        **config,
    )
    twin = peft.get_peft_model(nn.Sequential(base), lora).base_model.model[0]
    with torch.no_grad():
        twin.lora_A.default.weight.copy_(layer.lora_A)
        twin.lora_B.default.weight.copy_(layer.lora_B)
        if layer.use_dora:
            layer.lora_magnitude.mul_(1 + 0.1 * torch.rand(layer.out_features))
            twin.lora_magnitude_vector.default.weight.copy_(layer.lora_magnitude)
    return twin


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_outputs_and_gradients_are_pefts(options):
    layer = make_layer(QLoRALinear, r=4, alpha=6, **options)
    twin = peft_twin(layer)
    x, grad = torch.randn(5, 96, requires_grad=True), torch.randn(5, 48)
    y, want = layer(x), twin(x)
    assert_close(y, want)
    ours = [x, layer.lora_A, layer.lora_B]
    theirs = [x, twin.lora_A.default.weight, twin.lora_B.default.weight]
    if layer.use_dora:
        ours.append(layer.lora_magnitude)
        theirs.append(twin.lora_magnitude_vector.default.weight)
    got = torch.autograd.grad(y, ours, grad)
    for g, w in zip(got, torch.autograd.grad(want, theirs, grad), strict=True):
        assert_close(g, w)


def test_dora_with_dropout_is_pefts():
    layer = make_layer(QLoRALinear, r=4, use_dora=True, dropout=0.25)
    twin = peft_twin(layer, lora_dropout=0.25).train()
    x = torch.randn(5, 96)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    assert_close(y, twin(x))


def test_a_new_adapter_changes_nothing_and_is_initialized_as_pefts():
    layer = make_layer()
    x = torch.randn(3, 96)
    for options in ({}, {"use_dora": True}):
        lora = QLoRALinear.from_base(layer, r=64, **options)
        assert_close(lora(x), layer(x))
        assert not lora.lora_B.any()
        assert lora.lora_A.abs().max() <= 96**-0.5  # kaiming_uniform, a = sqrt(5)
        assert lora.lora_A.std().item() == pytest.approx(96**-0.5 / 3**0.5, rel=0.05)


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 2.0), (True, 8.0)])
def test_scaling(rslora, scaling):
    assert make_layer(QLoRALinear, r=16, alpha=32, use_rslora=rslora).scaling == scaling


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_merged_weight_is_pefts(options):
    layer = make_layer(QLoRALinear, r=4, **options)
    twin = peft_twin(layer)
    twin.merge()
    assert_close(layer.merged_weight(), twin.base_layer.weight)
    assert layer.merged_weight(torch.bfloat16).dtype == torch.bfloat16
