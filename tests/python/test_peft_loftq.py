"""LoftQ's initial adapters for 4-bit layers: nearer to the un-quantized model."""

from __future__ import annotations

import pytest
import torch

import qlora_native as qn
from tiny import make_llama

peft = pytest.importorskip("peft")
loftq = pytest.importorskip("qlora_native.integrations.peft_loftq")


def make(tmp_path):
    model = make_llama()
    model.save_pretrained(tmp_path)
    qn.quantize(model)
    config = peft.LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    return make_llama(), peft.get_peft_model(model, config)


def test_the_model_comes_nearer_to_the_unquantized_one(tmp_path):
    floats, model = make(tmp_path)
    before = distances(floats, model)
    names = loftq.replace_lora_weights_loftq(model, tmp_path)
    assert len(names) == 4 and "model.layers.0.self_attn.q_proj" in names
    after = distances(floats, model)
    for name in names:
        assert after[name] < 0.9 * before[name]
    q_proj = model.get_submodule(f"base_model.model.{names[0]}")
    residual = floats.get_submodule(names[0]).weight - q_proj.base_layer.dequantize()
    want = loftq_of_peft(residual, 8)
    for got, expected in zip((q_proj.lora_B, q_proj.lora_A), want, strict=True):
        assert torch.allclose(got.default.weight, expected, atol=1e-6)


def loftq_of_peft(residual, rank):
    from peft.utils.loftq_utils import _low_rank_decomposition

    parts = _low_rank_decomposition(residual, reduced_rank=rank)
    return parts["L"], parts["R"]


def distances(floats, model):
    return {
        name.removeprefix("base_model.model."): float(
            (
                layer.base_layer.dequantize()
                + layer.get_delta_weight("default")
                - floats.get_submodule(name.removeprefix("base_model.model.")).weight
            ).norm()
        )
        for name, layer in model.named_modules()
        if isinstance(layer, loftq.LoraLinear4bit)
    }


def test_a_callback_takes_a_replacement_back(tmp_path):
    _, model = make(tmp_path)
    before = {k: v.clone() for k, v in model.named_parameters() if "lora_" in k}
    told = []
    names = loftq.replace_lora_weights_loftq(
        model, tmp_path, callback=lambda m, name: bool(told.append(name))
    )
    assert names == [] and len(told) == 4
    assert all(torch.equal(model.get_parameter(k), v) for k, v in before.items())


def test_refusals(tmp_path):
    _, model = make(tmp_path)
    with pytest.raises(ValueError, match="no 4-bit layer of the model has an adapter 'other'"):
        loftq.replace_lora_weights_loftq(model, tmp_path, "other")
    make_llama(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no model.layers.1.*weight: is it of another"):
        loftq.replace_lora_weights_loftq(model, tmp_path)
    config = peft.LoraConfig(init_lora_weights="loftq", loftq_config=peft.LoftQConfig())
    with pytest.raises(ValueError, match="needs the weights that were quantized"):
        model.add_adapter("loftq", config)
