"""peft's LoRA on Linear4bit against peft's own layers on the dequantized weight."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from layers import assert_close
from qlora_native import autograd
from qlora_native.functional import dequantize_4bit, quantize_4bit
from qlora_native.nn import Linear4bit
from tiny import make_llama

peft = pytest.importorskip("peft")
integration = pytest.importorskip("qlora_native.integrations.peft")


class Net(nn.Module):
    """Two linears with a nonlinearity between, floats or 4-bit, and a head that stays float."""

    def __init__(self, q_proj, o_proj):
        super().__init__()
        self.q_proj, self.o_proj, self.head = q_proj, o_proj, nn.Linear(32, 8)

    def forward(self, x):
        return self.head(torch.tanh(self.o_proj(torch.tanh(self.q_proj(x)))))


def make_pair(**config):
    """Ours in 4 bits and its twin in floats, with the same adapter; options are LoraConfig's."""
    torch.manual_seed(0)
    layers = [Linear4bit(64, 48), Linear4bit(48, 32, bias=False)]
    ours, twin = Net(*layers), Net(*map(as_float, layers))
    twin.head.load_state_dict(ours.head.state_dict())
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"], **config}
    models = []
    for model in (ours, twin):
        torch.manual_seed(1)
        models.append(peft.get_peft_model(model, peft.LoraConfig(**config)))
    return models


def as_float(layer):
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    linear.weight.data = layer.dequantize(torch.float32)
    if layer.bias is not None:
        linear.bias.data = layer.bias.detach().clone()
    return linear


def adapter_state(model):
    return {
        name: value
        for name, value in model.named_parameters()
        if "lora_" in name or "modules_to_save" in name
    }


def share_adapters(ours, twin):
    """Give both the same adapter, with a B that has an effect."""
    torch.manual_seed(2)
    for name, value in adapter_state(twin).items():
        if value.requires_grad:
            with torch.no_grad():
                value.add_(0.1 * torch.randn_like(value))
            ours.get_parameter(name).data.copy_(value.data)


def assert_same(ours, twin, x=None):
    """Same outputs, and the same gradients of every adapter."""
    x = torch.randn(3, 5, 64) if x is None else x
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, want = ours(mine), twin(theirs)
    assert_close(got, want)
    grad = torch.randn_like(want)
    got.backward(grad)
    want.backward(grad)
    assert_close(mine.grad, theirs.grad)
    for name, value in adapter_state(twin).items():
        if value.grad is not None:
            assert_close(ours.get_parameter(name).grad, value.grad)
    ours.zero_grad()
    twin.zero_grad()


def calls_of_the_op(model, x, monkeypatch):
    calls = []
    real = autograd.qlora_linear
    monkeypatch.setattr(
        autograd, "qlora_linear", lambda *a: (calls.append(1), real(*a))[1], raising=True
    )
    model(x)
    monkeypatch.undo()
    return len(calls)


OPTIONS = {
    "plain": ({}, 2),
    "rslora": ({"use_rslora": True}, 2),
    "ranks": ({"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"o_proj": 3}}, 2),
    "gaussian": ({"init_lora_weights": "gaussian"}, 2),
    "modules_to_save": ({"modules_to_save": ["head"]}, 2),
    "one target": ({"target_modules": ["o_proj"]}, 1),
    "olora": ({"init_lora_weights": "olora"}, 2),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, 2),
    "dora": ({"use_dora": True}, 0),
    "lora_bias": ({"lora_bias": True, "target_modules": ["q_proj"]}, 0),
    "mica": ({"init_lora_weights": "mica"}, 0),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_outputs_and_gradients_are_pefts(case, monkeypatch):
    options, ops = OPTIONS[case]
    ours, twin = make_pair(**options)
    if case != "olora":  # which changes the base
        share_adapters(ours, twin)
        assert_same(ours, twin)
    assert {type(layer) for layer in lora_layers(ours)} == {integration.LoraLinear4bit}
    assert calls_of_the_op(ours, torch.randn(2, 64), monkeypatch) == ops


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_an_initialization_of_the_base_is_pefts_and_the_residual_is_quantized(init):
    ours, twin = make_pair(init_lora_weights=init)
    for name, value in adapter_state(twin).items():
        assert torch.equal(ours.get_parameter(name), value), name
    for got, want in zip(base_layers(ours), base_layers(twin), strict=True):
        residual = want.weight.data
        assert torch.equal(got.weight, quantize_4bit(residual, double_quant=True)[0])


def base_layers(model):
    return [layer.get_base_layer() for layer in lora_layers(model)]


def lora_layers(model):
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


@pytest.mark.parametrize("dora", [False, True])
def test_merging_is_pefts_and_unmerging_restores_every_bit(dora):
    ours, twin = make_pair(use_dora=dora)
    share_adapters(ours, twin)
    before = copy.deepcopy(ours.state_dict())
    x = torch.randn(4, 64)
    want = ours(x)
    ours.merge_adapter(safe_merge=True)
    twin.merge_adapter()
    for got, floats in zip(base_layers(ours), base_layers(twin), strict=True):
        # Where the sums differ in the last bit, a code on the edge between two may.
        packed, state = quantize_4bit(floats.weight.data, double_quant=True)
        assert_within(got.dequantize(), dequantize_4bit(packed, state), share=1e-3)
    assert (ours(x) - want).norm() / want.norm() < 0.2
    ours.unmerge_adapter()
    after = ours.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(ours(x), want)


def assert_within(got, want, share):
    assert ((got - want).abs() > 1e-5).float().mean() <= share


def test_merge_and_unload_gives_linear_4bit_again():
    ours, twin = make_pair()
    share_adapters(ours, twin)
    merged = ours.merge_and_unload()
    assert type(merged.q_proj) is Linear4bit and merged.q_proj.bias is not None
    packed, _ = quantize_4bit(twin.merge_and_unload().q_proj.weight.data, double_quant=True)
    assert (packed != merged.q_proj.weight).float().mean() < 1e-3
    assert type(make_pair()[0].unload().q_proj) is Linear4bit


def test_several_adapters_are_pefts():
    ours, twin = make_pair()
    for model in (ours, twin):
        torch.manual_seed(4)
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    share_adapters(ours, twin)
    for model in (ours, twin):
        model.set_adapter("other")
    share_adapters(ours, twin)
    assert_same(ours, twin)
    for model in (ours, twin):
        model.base_model.set_adapter(["default", "other"])
    assert_same(ours, twin)
    for kind in ("linear", "cat", "svd"):
        for model in (ours, twin):
            model.add_weighted_adapter(
                ["default", "default"], [0.7, 0.5], kind, combination_type=kind
            )
            model.set_adapter(kind)
        assert_same(ours, twin)
    x = torch.randn(2, 64)
    with ours.disable_adapter(), twin.disable_adapter():
        assert_close(ours(x), twin(x))
    names = ["default", "other", "__base__"]
    ours.eval(), twin.eval()
    x = torch.randn(3, 64)
    for model in (ours, twin):
        model.set_adapter("default")
    with torch.no_grad():
        assert_close(ours(x, adapter_names=names), twin(x, adapter_names=names))
    ours.delete_adapter("other")
    assert_close(ours(x), twin(x))


def test_disabling_while_merged_gives_the_base():
    ours, twin = make_pair()
    share_adapters(ours, twin)
    x = torch.randn(3, 64)
    ours.merge_adapter()
    with ours.disable_adapter(), twin.disable_adapter():
        assert_close(ours(x), twin(x))
    assert not lora_layers(ours)[0].merged


def test_dropout_drops_its_share_and_repeats_with_the_seed():
    ours, _ = make_pair(lora_dropout=0.5, target_modules=["q_proj"])
    layer = ours.base_model.model.q_proj
    nn.init.normal_(layer.lora_B.default.weight)
    x = torch.randn(1, 64)
    base = layer.base_layer(x)
    want = layer.eval()(x) - base
    layer.train()
    torch.manual_seed(3)
    draws = torch.stack([layer(x) - base for _ in range(2000)])
    torch.manual_seed(3)
    assert torch.equal(layer(x) - base, draws[0])
    spread = draws.std(0) / 2000**0.5
    assert ((draws.mean(0) - want).abs() < 5 * spread).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_activations_under_a_float_adapter(dtype):
    ours, twin = make_pair()
    share_adapters(ours, twin)
    layer, other = lora_layers(ours)[0], lora_layers(twin)[0]
    x = torch.randn(3, 64).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert_close(y, other(x.float()), dtype)
    with torch.autocast("cpu", dtype):
        assert layer(x.float()).dtype == dtype


def test_a_compute_dtype_holds_for_the_op_and_for_pefts_forward(monkeypatch):
    from qlora_native.integrations.loaded_linear import LoadedLinear4bit

    ours, twin = make_pair()
    share_adapters(ours, twin)
    layer, other = lora_layers(ours)[0], lora_layers(twin)[0]
    layer.base_layer = LoadedLinear4bit.from_base(layer.base_layer, torch.bfloat16)
    x = torch.randn(3, 64)
    y = layer(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, layer(x.bfloat16().float()))
    assert_close(y, other(x), torch.bfloat16)
    monkeypatch.setattr(layer, "_only_plain_adapter", lambda: None)
    assert_close(layer(x), other(x), torch.bfloat16)


def test_hooks_on_an_adapter_are_called():
    ours, _ = make_pair()
    seen = []
    layer = lora_layers(ours)[0]
    layer.lora_A.default.register_forward_hook(lambda *a: seen.append(1))
    layer(torch.randn(2, 64))
    assert seen


def test_all_linear_and_counts_and_saving(tmp_path):
    import qlora_native as qn

    model = make_llama(tie_word_embeddings=False)
    all_parameters = model.num_parameters()
    qn.quantize(model)
    config = peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    ours = peft.get_peft_model(model, config)
    assert len(lora_layers(ours)) == 14
    trainable, total = ours.get_nb_trainable_parameters()
    assert total == all_parameters + trainable
    ids = torch.arange(8)[None]
    want = ours(input_ids=ids).logits
    ours.save_pretrained(tmp_path)
    base = make_llama(tie_word_embeddings=False)
    qn.quantize(base)
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(again(input_ids=ids).logits, want)
    floats = peft.PeftModel.from_pretrained(make_llama(tie_word_embeddings=False), tmp_path)
    assert adapter_state(floats).keys() == adapter_state(again).keys()


def test_a_conv1d_keeps_its_orientation():
    from transformers.pytorch_utils import Conv1D

    import qlora_native as qn

    torch.manual_seed(0)
    ours = nn.Sequential(nn.Identity(), Conv1D(48, 64))
    twin = copy.deepcopy(ours)
    qn.quantize(ours)
    twin[1].weight.data = ours[1].dequantize(torch.float32).T.contiguous()
    config = {"target_modules": ["1"], "fan_in_fan_out": True, "init_lora_weights": False}
    ours, twin = (peft.get_peft_model(m, peft.LoraConfig(**config)) for m in (ours, twin))
    share_adapters(ours, twin)
    assert_same(ours, twin)


@pytest.mark.parametrize("merged", [False, True])
def test_copies(merged):
    ours, twin = make_pair()
    share_adapters(ours, twin)
    if merged:
        ours.merge_adapter()
    x = torch.randn(2, 64)
    want = ours(x)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x), want)
        if merged:
            other.unmerge_adapter()
    shallow = copy.copy(lora_layers(ours)[0])
    assert shallow.base_layer is lora_layers(ours)[0].base_layer


def test_refusals():
    import qlora_native as qn

    with pytest.raises(TypeError, match="modules_to_save names a 4-bit layer"):
        make_pair(target_modules=["q_proj"], modules_to_save=["o_proj"])
    model = nn.Sequential(nn.Linear(64, 64))
    qn.quantize(model)
    qn.add_lora(model, targets=["0"])
    with pytest.raises(ValueError, match="0 has an adapter of qlora_native"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
    ours, _ = make_pair()
    lora_layers(ours)[0].lora_B.default.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="NaNs detected"):
        ours.merge_adapter(safe_merge=True)
    with pytest.raises(ValueError, match="the merged weight"):
        ours.merge_adapter()


def test_versions_warn_once(monkeypatch):
    from qlora_native.integrations import versions

    monkeypatch.setattr(versions, "version", lambda name: "0.17.1.dev0")
    monkeypatch.setattr(versions, "_told", set())
    with pytest.warns(UserWarning, match=r"peft >= 0.21, < 0.22, and 0.17.1.dev0 is installed"):
        versions.check("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check("peft")
    monkeypatch.undo()
    assert versions._key("0.21.2") == (0, 21, 2)


def test_bitsandbytes_and_ours_merge_to_the_same_bits():
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    theirs = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compress_statistics=False)
    theirs = theirs.to("cpu")
    ours = Linear4bit(128, 64, bias=False, double_quant=False)
    ours.load_state_dict(theirs.state_dict())
    models = [nn.Sequential(layer, nn.LayerNorm(64)) for layer in (ours, theirs)]
    models[1].is_loaded_in_4bit = True
    merged = []
    for model in models:
        torch.manual_seed(1)
        config = peft.LoraConfig(target_modules=["0"], init_lora_weights=False)
        merged.append(peft.get_peft_model(model, config).merge_and_unload()[0])
    assert torch.equal(merged[0].weight, merged[1].weight.data)
    assert torch.equal(merged[0].absmax, merged[1].weight.quant_state.absmax)
