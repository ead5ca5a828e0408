"""Whole models with adapters: gradient checkpointing, training, merging, compile."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora_native.model import (
    add_lora,
    lora_layers,
    merge,
    quantize,
    quantized_layers,
    unmerge,
)
from tiny_models import Mlp, quantized_mlp, shake_adapters, some_ids, tiny_llama


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("reentrant", [True, False])
def test_transformers_gradient_checkpointing(reentrant):
    model = tiny_llama()
    quantize(model)
    add_lora(model, r=4, dropout=0.1)
    shake_adapters(model)
    model.train()
    ids = some_ids()

    def step():
        model.zero_grad()
        torch.manual_seed(3)
        model(ids, labels=ids, use_cache=False).loss.backward()
        return gradients(model)

    want = step()
    assert not model.get_input_embeddings()(ids).requires_grad
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = step()
    assert want.keys() == got.keys()
    for name in want:
        assert torch.allclose(got[name], want[name], atol=1e-6), name


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("embedded", [True, False], ids=["embedding", "no embedding"])
def test_plain_gradient_checkpointing(reentrant, embedded):
    class Checkpointed(Mlp):
        checkpointing = False

        def block(self, i, x):
            if not self.checkpointing:
                return super().block(i, x)
            return checkpoint(super().block, i, x, use_reentrant=reentrant)

        def forward(self, x):
            x = self.embed(x) if embedded else x
            return self.lm_head(self.block(1, self.block(0, x)))

    torch.manual_seed(0)
    model = Checkpointed()
    if not embedded:
        model.embed = None
    quantize(model)
    add_lora(model)
    shake_adapters(model)
    x = some_ids(vocabulary=20) if embedded else torch.randn(2, 3, 32)
    model(x).square().sum().backward()
    want = gradients(model)
    model.zero_grad()
    model.checkpointing = True
    model(x).square().sum().backward()
    got = gradients(model)
    for name in want:
        assert torch.allclose(got[name], want[name], atol=1e-5), name


def test_copies_of_a_model_have_a_hook_of_their_own():
    model = tiny_llama()
    quantize(model)
    add_lora(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        hooks = list(other.get_input_embeddings()._forward_hooks.values())
        assert [hook.__self__.model is other for hook in hooks] == [True]
        ids = some_ids()
        assert torch.equal(other(ids).logits, model(ids).logits)


def test_trains_to_a_lower_loss_and_as_peft_on_the_dequantized_base():
    peft = pytest.importorskip("peft")
    ours, base = tiny_llama(), tiny_llama()
    quantize(ours)
    with torch.no_grad():
        for name, layer in quantized_layers(ours):
            base.get_submodule(name).weight.copy_(layer.dequantize())
    add_lora(ours, r=4, alpha=8)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, layer in lora_layers(ours):
            twin = theirs.base_model.model.get_submodule(name)
            twin.lora_A.default.weight.copy_(layer.lora_A)

    ids = some_ids(4, 16)

    def train(model):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(12):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    losses, wanted = train(ours), train(theirs)
    assert losses[-1] < 0.9 * losses[0]
    assert losses == pytest.approx(wanted, rel=1e-3)


def test_merge_and_unmerge_restore_every_bit():
    model = quantized_mlp()
    add_lora(model)
    shake_adapters(model)
    ids = some_ids(vocabulary=20)
    before, state = model(ids), copy.deepcopy(model.state_dict())
    merge(model)
    merged = model(ids)
    assert not torch.equal(merged, before)
    assert torch.nn.functional.cosine_similarity(merged.view(-1), before.view(-1), 0) > 0.95
    unmerge(model)
    assert torch.equal(model(ids), before)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_to_a_float_dtype_makes_plain_linears(dtype):
    model = quantized_mlp(skip=("lm_head", "layers.1.up_proj"))
    add_lora(model, targets=["up_proj"])
    shake_adapters(model)
    ids = some_ids(vocabulary=20)
    before = model(ids)
    merge(model, dtype)
    assert not any(True for _ in quantized_layers(model))
    assert type(model.layers[0]["up_proj"]) is nn.Linear
    assert model.layers[0]["up_proj"].weight.dtype == dtype
    if dtype == torch.float32:
        assert torch.allclose(model(ids), before, atol=1e-5)


def test_a_llama_compiles_whole_and_gives_the_same_bits():
    torch._dynamo.reset()
    model = tiny_llama(num_hidden_layers=1)
    quantize(model)
    add_lora(model, r=4)
    shake_adapters(model)
    model.train()
    ids = some_ids()
    results = []
    for which in (torch.compile(model, fullgraph=True, backend="aot_eager"), model):
        model.zero_grad()
        loss = which(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    (loss, got), (want_loss, want) = results
    assert torch.equal(loss, want_loss)
    assert all(torch.equal(got[name], want[name]) for name in want)
