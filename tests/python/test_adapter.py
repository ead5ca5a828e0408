"""Adapters in PEFT's files: PEFT reads ours and we read PEFT's, to the same logits."""

from __future__ import annotations

import copy
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from qlora_native.adapter import CONFIG_NAME, WEIGHTS_NAME, load_adapter, save_adapter
from qlora_native.model import add_lora, lora_layers, quantize, quantized_layers, remove_lora
from tiny_models import Mlp, some_ids, tiny_llama

IDS = some_ids()


def quantized_llama():
    model = tiny_llama()
    quantize(model)
    return model


def dequantized_llama():
    """The float model that PEFT gets: the base that ours computes with."""
    ours, base = quantized_llama(), tiny_llama()
    with torch.no_grad():
        for name, layer in quantized_layers(ours):
            base.get_submodule(name).weight.copy_(layer.dequantize())
    return base


def shake(model):
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
        elif "lora_magnitude" in name:
            with torch.no_grad():
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))


def adapted(**options):
    model = quantized_llama()
    add_lora(model, **{"r": 4, "alpha": 6, **options})
    shake(model)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


# What both sides can express: ours -> PEFT's LoraConfig.
OURS = {
    "all-linear": {},
    "two targets": {"targets": ["q_proj", "v_proj"]},
    "some layers": {"targets": r"model\.layers\.1\..*"},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "down_proj": 8}, "alpha_pattern": {"v_proj": 3.5}},
}

THEIRS = {
    "all-linear": {"target_modules": "all-linear"},
    "list": {"target_modules": ["q_proj", "mlp.up_proj"]},
    "regex": {"target_modules": r".*layers\.1\.mlp\..*_proj"},
    "rsLoRA": {"target_modules": ["o_proj"], "use_rslora": True},
    "DoRA": {"target_modules": ["k_proj", "down_proj"], "use_dora": True},
    "gaussian": {"target_modules": ["k_proj"], "init_lora_weights": "gaussian"},
    "dropout": {"target_modules": ["k_proj"], "lora_dropout": 0.3},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
        "alpha_pattern": {"o_proj": 11},
    },
}


@pytest.mark.parametrize("case", OURS)
def test_peft_reads_ours(case, tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted(**OURS[case])
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(dequantized_llama(), tmp_path)
    assert torch.allclose(logits(theirs), logits(model), atol=5e-5)
    assert not torch.allclose(logits(model), logits(quantized_llama()), atol=1e-3)


@pytest.mark.parametrize("case", THEIRS)
def test_we_read_pefts(case, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **THEIRS[case])
    theirs = peft.get_peft_model(dequantized_llama(), config)
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    model = quantized_llama()
    names = load_adapter(model, tmp_path)
    assert names == [name for name, _ in lora_layers(model)]
    assert torch.allclose(logits(model), logits(theirs), atol=5e-5)
    assert not torch.allclose(logits(model), logits(quantized_llama()), atol=1e-3)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("case", OURS)
def test_round_trip_is_exact(case, tmp_path):
    model = adapted(**OURS[case])
    save_adapter(model, tmp_path)
    other = quantized_llama()
    load_adapter(other, tmp_path, trainable=True)
    assert torch.equal(logits(other), logits(model))
    trainable = {name for name, p in other.named_parameters() if p.requires_grad}
    assert trainable == {name for name, p in model.named_parameters() if p.requires_grad}
    again = tmp_path / "again"
    save_adapter(other, again)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_config_is_what_peft_expects(tmp_path):
    save_adapter(adapted(dropout=0.1), tmp_path, base_model_name="some/model")
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert config["base_model_name_or_path"] == "some/model"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 6, 0.1)
    keys = set(load_file(tmp_path / WEIGHTS_NAME))
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    assert len(keys) == 28


def test_models_without_transformers(tmp_path):
    torch.manual_seed(0)
    model = Mlp()
    quantize(model)
    other = copy.deepcopy(model)
    add_lora(model, targets=["up_proj"])
    shake(model)
    save_adapter(model, tmp_path, task_type=None)
    load_adapter(other, tmp_path)
    ids = some_ids(vocabulary=20)
    assert torch.equal(other(ids), model(ids))


def test_a_compiled_model_saves_under_its_own_names(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path / "plain")
    save_adapter(torch.compile(model), tmp_path / "compiled")
    plain, compiled = (load_file(tmp_path / n / WEIGHTS_NAME) for n in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()


def test_loading_replaces_adapters_that_are_there(tmp_path):
    model = adapted(targets=["q_proj"])
    save_adapter(model, tmp_path)
    other = adapted(r=9)
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))


# ---- what does not fit --------------------------------------------------------------------------


def change_config(**changes):
    def change(folder):
        path = folder / CONFIG_NAME
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def change_tensors(change):
    def apply(folder):
        path = folder / WEIGHTS_NAME
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return apply


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"

REFUSED = {
    "no config": (lambda f: (f / CONFIG_NAME).unlink(), FileNotFoundError, "is missing"),
    "no weights": (lambda f: (f / WEIGHTS_NAME).unlink(), FileNotFoundError, "is missing"),
    "a pickle": (
        lambda f: (f / WEIGHTS_NAME).rename(f / "adapter_model.bin"),
        FileNotFoundError,
        "adapter_model.bin, a pickle, is not read",
    ),
    "config not JSON": (
        lambda f: (f / CONFIG_NAME).write_text("{"),
        ValueError,
        "adapter_config.json is not JSON",
    ),
    "config a list": (
        lambda f: (f / CONFIG_NAME).write_text("[]"),
        ValueError,
        "must be a JSON object, got list",
    ),
    "truncated weights": (
        lambda f: os.truncate(f / WEIGHTS_NAME, 1000),
        ValueError,
        "adapter_model.safetensors is damaged",
    ),
    "not LoRA": (change_config(peft_type="IA3"), ValueError, "peft_type must be 'LORA', got 'IA3'"),
    "bias": (change_config(bias="all"), ValueError, "asks for what is not supported: bias='all'"),
    "modules_to_save": (
        change_config(modules_to_save=["lm_head"], lora_bias=True),
        ValueError,
        r"lora_bias=True, modules_to_save=\['lm_head'\]",
    ),
    "PiSSA": (
        change_config(init_lora_weights="pissa_niter_4"),
        ValueError,
        "init_lora_weights='pissa_niter_4' .it changed the base weights",
    ),
    "wrong rank": (
        change_config(rank_pattern={"q_proj": 3}),
        ValueError,
        rf"of another shape \(4\):\n    {Q0}.lora_A.weight \[4, 64\], not \[3, 64\]",
    ),
    "missing": (
        change_tensors(lambda t: t.pop(f"{Q0}.lora_B.weight")),
        ValueError,
        rf"missing \(1\):\n    {Q0}.lora_B.weight$",
    ),
    "a module without its tensors": (
        change_tensors(lambda t: [t.pop(k) for k in list(t) if "layers.1" in k]),
        ValueError,
        r"missing \(14\):(\n    .*layers.1.*){6}\n    … and 8 more",
    ),
    "unknown module": (
        change_tensors(lambda t: t.update({f"{Q0}x.lora_A.weight": torch.zeros(4, 64)})),
        ValueError,
        rf"has no model.layers.0.self_attn.q_projx; did you mean (.|\n)*unexpected .1.:\n    {Q0}x",
    ),
    "not quantized": (
        change_tensors(
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)})
        ),
        ValueError,
        "lm_head is not quantized, so cannot hold an adapter",
    ),
    "another width": (
        change_tensors(lambda t: t.update({f"{Q0}.lora_A.weight": torch.zeros(4, 65)})),
        ValueError,
        rf"{Q0}.lora_A.weight \[4, 65\], not \[4, 64\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_and_leaves_the_model_as_it_was(case, tmp_path):
    damage, error, message = REFUSED[case]
    save_adapter(adapted(), tmp_path)
    damage(tmp_path)
    model = adapted(targets=["k_proj"])
    before = logits(model)
    with pytest.raises(error, match=message):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)


def test_refuses_a_model_without_quantized_linears(tmp_path):
    save_adapter(adapted(), tmp_path)
    with pytest.raises(ValueError, match="no quantized linear: call quantize"):
        load_adapter(tiny_llama(), tmp_path)


def test_save_refuses_what_pefts_config_cannot_say(tmp_path):
    model = quantized_llama()
    with pytest.raises(ValueError, match="the model has no adapters"):
        save_adapter(model, tmp_path)
    add_lora(model)
    next(lora_layers(model))[1].dropout = 0.5
    with pytest.raises(ValueError, match=r"dropout must be the same on all layers"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("when", ["fsync", "replace"])
def test_a_crash_while_saving_leaves_the_old_adapter(when, tmp_path, monkeypatch):
    model = adapted()
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    shake(model)
    remove_lora(model)
    add_lora(model, r=2)

    def crash(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, when, crash)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
