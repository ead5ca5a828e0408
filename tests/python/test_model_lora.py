"""add_lora and remove_lora on whole models."""

from __future__ import annotations

import pytest
import torch

from qlora_native.model import (
    add_lora,
    disable_adapters,
    lora_layers,
    quantize,
    quantized_layers,
    remove_lora,
    trainable_parameters,
)
from qlora_native.nn import Linear4bit
from tiny_models import LLAMA_LINEARS, Mlp, quantized_mlp, shake_adapters, some_ids, tiny_llama


def test_add_lora_freezes_all_else():
    model = tiny_llama()
    quantize(model)
    assert add_lora(model, r=4) == LLAMA_LINEARS
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"{name}.lora_{part}" for name in LLAMA_LINEARS for part in "AB"}
    assert len(trainable_parameters(model)) == 28


@pytest.mark.parametrize(
    ("targets", "exclude", "count"),
    [
        ("all-linear", (), 14),
        (["q_proj", "v_proj"], (), 4),
        (["layers.0.mlp.up_proj"], (), 1),
        (r".*layers\.1\..*proj", (), 7),
        ("all-linear", ["mlp.down_proj"], 12),
        ("all-linear", r".*self_attn.*", 6),
    ],
    ids=str,
)
def test_targets(targets, exclude, count):
    model = tiny_llama()
    quantize(model)
    assert len(add_lora(model, targets=targets, exclude=exclude)) == count


def test_all_linear_leaves_a_quantized_head_alone():
    model = tiny_llama(tie_word_embeddings=False)
    quantize(model, skip=())
    assert add_lora(model) == LLAMA_LINEARS
    remove_lora(model)
    assert add_lora(model, targets=["lm_head"]) == ["lm_head"]


def test_rank_and_alpha_patterns():
    model = tiny_llama()
    quantize(model)
    add_lora(model, r=8, alpha=16, rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\..*": 5})
    layers = dict(lora_layers(model))
    assert layers["model.layers.0.self_attn.q_proj"].r == 2
    assert layers["model.layers.0.self_attn.k_proj"].r == 8
    assert layers["model.layers.0.mlp.up_proj"].alpha == 16
    assert layers["model.layers.1.mlp.up_proj"].alpha == 5


REFUSED = {
    "near miss": ({"targets": ["up_prj"]}, "target 'up_prj' matches no quantized linear: did you "),
    "nothing near": (
        {"targets": ["xyz"]},
        "matches no quantized linear: it has up_proj, down_proj",
    ),
    "one of two": ({"targets": ["up_proj", "q_proj"]}, "target 'q_proj' matches no quantized"),
    "regex": ({"targets": r".*\.up_prj"}, r"matches no quantized linear"),
    "not quantized": ({"targets": ["lm_head"]}, "it means lm_head, which is not quantized"),
    "all excluded": ({"exclude": ["up_proj", "down_proj"]}, "leaves none of the 4 quantized"),
    "r": ({"r": -1}, "r must be an integer of at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_add_lora_refuses(case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        add_lora(quantized_mlp(), **options)


def test_add_lora_needs_quantized_linears_without_adapters():
    with pytest.raises(ValueError, match="no quantized linear: call quantize"):
        add_lora(Mlp())
    model = quantized_mlp()
    add_lora(model)
    with pytest.raises(ValueError, match="adapters already: call remove_lora"):
        add_lora(model)


def test_remove_lora_gives_the_base_back():
    model = quantized_mlp()
    ids = some_ids(vocabulary=20)
    before = model(ids)
    add_lora(model)
    shake_adapters(model)
    assert not torch.equal(model(ids), before)
    with disable_adapters(model):
        assert torch.equal(model(ids), before)
    assert not torch.equal(model(ids), before)
    remove_lora(model)
    assert torch.equal(model(ids), before)
    assert all(type(layer) is Linear4bit for _, layer in quantized_layers(model))
    assert not model.embed._forward_hooks
