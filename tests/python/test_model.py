"""quantize, add_lora and what goes with them, on whole models."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qlora_native.model import (
    add_lora,
    disable_adapters,
    footprint,
    lora_layers,
    merge,
    quantize,
    quantized_layers,
    remove_lora,
    trainable_parameters,
    unmerge,
)
from qlora_native.nn import Linear4bit, QLoRALinear
from tiny_models import Mlp, some_ids, tiny_llama

LINEARS = [
    f"model.layers.{i}.{name}"
    for i in range(2)
    for name in (
        *(f"self_attn.{p}_proj" for p in "qkvo"),
        *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
    )
]


def mlp(**options):
    torch.manual_seed(0)
    model = Mlp()
    quantize(model, **options)
    return model


def shake_adapters(model, std=0.05):
    """Adapters that do something: lora_B is zero at first."""
    torch.manual_seed(7)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=std)


# ---- quantize -----------------------------------------------------------------------------------


def test_quantizes_every_linear_but_the_head():
    model = tiny_llama()
    report = quantize(model)
    assert report.quantized == LINEARS == [name for name, _ in quantized_layers(model)]
    assert set(report.left) == {"model.embed_tokens", "lm_head"}
    assert "lm_head" in str(report) and "14 linears quantized" in str(report)
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
    ids=str,
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
    want = mlp()
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
    model = mlp()
    before = footprint(model)
    add_lora(model, r=4)
    merge(model)
    size = footprint(model)
    assert size.n_trainable == 4 * (32 + 64) * 4 and size.trainable_bytes == 4 * size.n_trainable
    assert size.quantized_bytes == before.quantized_bytes == size.merged_bytes
    assert size.total_bytes == before.total_bytes + size.merged_bytes + size.trainable_bytes


# ---- add_lora -----------------------------------------------------------------------------------


def test_add_lora_freezes_all_else():
    model = tiny_llama()
    quantize(model)
    assert add_lora(model, r=4) == LINEARS
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"{name}.lora_{part}" for name in LINEARS for part in "AB"}
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
    assert add_lora(model) == LINEARS
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
        add_lora(mlp(), **options)


def test_add_lora_needs_quantized_linears_without_adapters():
    with pytest.raises(ValueError, match="no quantized linear: call quantize"):
        add_lora(Mlp())
    model = mlp()
    add_lora(model)
    with pytest.raises(ValueError, match="adapters already: call remove_lora"):
        add_lora(model)


def test_remove_lora_gives_the_base_back():
    model = mlp()
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


# ---- gradient checkpointing ---------------------------------------------------------------------


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


# ---- training and merging -----------------------------------------------------------------------


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
    model = mlp()
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
    model = mlp(skip=("lm_head", "layers.1.up_proj"))
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
