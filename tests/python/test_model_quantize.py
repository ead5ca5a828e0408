"""quantize and footprint: which linears of a model go to 4 bits, and what is left of it."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from qlora_native.model import (
    add_lora,
    footprint,
    merge,
    quantize,
    quantized_layers,
)
from qlora_native.nn import Linear4bit, QLoRALinear
from tiny_models import LLAMA_LINEARS, Mlp, quantized_mlp, some_ids, tiny_llama


def test_quantizes_every_linear_but_the_head():
    model = tiny_llama()
    report = quantize(model)
    assert report.quantized == LLAMA_LINEARS == [name for name, _ in quantized_layers(model)]
    assert set(report.left) == {"model.embed_tokens", "lm_head"}
    assert "lm_head" in str(report) and "14 weights quantized" in str(report)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_logits_are_those_of_the_dequantized_model():
    model, plain = tiny_llama(), tiny_llama()
    quantize(model)
    with torch.no_grad():
        for name, layer in quantized_layers(model):
            plain.get_submodule(name).weight.copy_(layer.dequantize())
        ids = some_ids()
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=2e-5)


def test_a_head_tied_to_the_embedding_is_left_even_if_not_skipped():
    model = tiny_llama()
    report = quantize(model, skip=())
    assert report.left["lm_head"] == (
        "its weight is tied to model.embed_tokens, which is not quantized"
    )
    untied = tiny_llama(tie_word_embeddings=False)
    assert "lm_head" in quantize(untied, skip=()).quantized


def test_linears_tied_to_each_other_share_one_quantized_weight():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    assert quantize(model).quantized == ["0", "1"]
    assert model[0].weight is model[1].weight and model[0].absmax is model[1].absmax
    assert model[0].bias is not model[1].bias
    assert footprint(model).n_quantized == 64 * 64


def test_a_module_reached_by_two_names_stays_one():
    linear = nn.Linear(64, 64)
    model = nn.ModuleDict({"a": linear, "b": nn.Sequential(linear)})
    assert quantize(model).quantized == ["a"]
    assert isinstance(model["a"], Linear4bit) and model["b"][0] is model["a"]
    assert add_lora(model) == ["a"]
    assert isinstance(model["a"], QLoRALinear) and model["b"][0] is model["a"]


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        (("up_proj",), {"layers.0.up_proj", "layers.1.up_proj"}),
        (("layers.0",), {"layers.0.up_proj", "layers.0.down_proj"}),
        (("layers.1.down_proj",), {"layers.1.down_proj"}),
    ],
    ids=lambda names: ",".join(sorted(names)),  # a set's own order differs between processes
)
def test_skip(skip, left):
    report = quantize(Mlp(), skip=("lm_head", *skip))
    assert set(report.left) == left | {"embed", "lm_head"}
    assert report.left[min(left)] == f"in skip, by {skip[0]!r}"


def test_skip_that_matches_nothing_is_an_error():
    with pytest.raises(
        ValueError, match="skip: 'up_prj' matches no module; did you mean 'up_proj'"
    ):
        quantize(Mlp(), skip=("up_prj",))


class Odd(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def test_tells_why_a_linear_is_left():
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(64, 2),
            "fp64": nn.Linear(64, 64, dtype=torch.float64),
            "odd": Odd(64, 64),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)),
            "conv": nn.Conv1d(4, 4, 3),
            "fine": nn.Linear(64, 64),
        }
    )
    report = quantize(model)
    assert report.quantized == ["fine"]
    assert "nn.MultiheadAttention reads" in report.left["attention.out_proj"]
    assert "float64" in report.left["fp64"]
    assert "forward is its own" in report.left["odd"]
    assert "parametrized" in report.left["normed"]
    assert "weight of a Conv1d, which is not an nn.Linear" in report.left["conv"]
    assert "in_proj_weight" in report.left["attention"]


def test_refuses_what_it_cannot_replace_in_place():
    with pytest.raises(ValueError, match=r"itself a linear: use nn.Linear4bit.from_linear"):
        quantize(nn.Linear(64, 64))


def test_leaves_pefts_adapters_alone_and_runs_twice():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Mlp(), peft.LoraConfig(target_modules=["up_proj"]))
    report = quantize(model)
    assert report.left["base_model.model.layers.0.up_proj.lora_A.default"] == (
        "an adapter's own matrix"
    )
    assert len(report.quantized) == 4 and quantize(model).quantized == []


def test_gpt2s_conv1d_is_quantized_transposed():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    plain = copy.deepcopy(model)
    report = quantize(model)
    assert "transformer.h.0.attn.c_attn" in report.quantized
    with torch.no_grad():
        for name, layer in quantized_layers(model):
            assert layer.fan_in_fan_out
            plain.get_submodule(name).weight.copy_(layer.dequantize().T)
        ids = some_ids(vocabulary=64)
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=2e-5)
    assert len(add_lora(model)) == 4


def test_frees_each_float_weight_before_the_next():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    alive = [weakref.ref(layer.weight) for layer in model]
    counts = []
    original = Linear4bit.from_linear.__func__

    def counting(cls, linear, **options):
        gc.collect()
        counts.append(sum(ref() is not None for ref in alive))
        return original(cls, linear, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Linear4bit, "from_linear", classmethod(counting))
        quantize(model)
    assert counts == [4, 3, 2, 1]


def test_hooks_and_mode_go_over_to_the_new_module():
    model = nn.Sequential(nn.Linear(32, 32)).eval()
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(type(module)))
    quantize(model)
    assert not model[0].training
    add_lora(model)
    model(torch.ones(1, 32))
    assert seen == [QLoRALinear] and not model[0].training


def test_nonfinite_weight_is_named():
    model = Mlp()
    with torch.no_grad():
        model.layers[1]["up_proj"].weight[3, 3] = torch.inf
    with pytest.raises(ValueError, match=r"layers.1.up_proj.weight .*0 NaN and 1 Inf"):
        quantize(model)


def test_a_meta_model_waits_for_its_checkpoint():
    want = quantized_mlp()
    with torch.device("meta"):
        model = Mlp()
    quantize(model)
    model.load_state_dict(want.state_dict(), assign=True)
    ids = some_ids(vocabulary=20)
    assert torch.equal(model(ids), want(ids))


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_storage_is_below_4_2_bits(format):
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 512))
    quantize(model, format=format)
    size = footprint(model.requires_grad_(False))
    assert size.n_quantized == 1024 * 1536
    assert size.bits_per_quantized_parameter <= 4.2
    held = sum(t.nbytes for t in model.buffers())
    assert size.quantized_bytes == held and size.other_bytes == 4 * 1536
    assert "4.127 bits" in str(size)


def test_footprint_of_adapters_and_merged_copies():
    model = quantized_mlp()
    before = footprint(model)
    add_lora(model, r=4)
    merge(model)
    size = footprint(model)
    assert size.n_trainable == 4 * (32 + 64) * 4 and size.trainable_bytes == 4 * size.n_trainable
    assert size.quantized_bytes == before.quantized_bytes == size.merged_bytes
    assert size.total_bytes == before.total_bytes + size.merged_bytes + size.trainable_bytes
