"""save_merged: folders that load to the merged model, and a report that tells the truth."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

from qlora_native.adapter import load_adapter, save_adapter
from qlora_native.merging import PROMPTS, save_merged
from qlora_native.model import add_lora, lora_layers, merge, quantize
from tiny_models import some_ids, tiny_llama

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

IDS = some_ids()
WORDS = sorted({word for prompt in PROMPTS for word in prompt.split()})


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {"<unk>": 0, "<s>": 1, **{word: i for i, word in enumerate(WORDS, start=2)}}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>"
    )


def adapted(model=None, **options):
    model = tiny_llama() if model is None else model
    quantize(model)
    add_lora(model, r=4, **options)
    torch.manual_seed(7)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=2e-3)
    return model


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_a_float_folder_is_the_merged_model(options, tokenizer, tmp_path):
    model = adapted(**options)
    before = logits(model)
    report = save_merged(model, tokenizer, tmp_path / "m", dtype=torch.float32)
    assert torch.equal(logits(model), before)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.allclose(logits(loaded), before, atol=2e-5)
    assert loaded.dtype == torch.float32
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "m")("The").input_ids
    assert report.layers == 14 and report.relative_error == 0 and abs(report.kl) < 1e-6
    assert report.kept == pytest.approx(1)
    assert report.same_top == 1 and report.tokens > 20


def test_a_16_bit_folder_is_it_within_rounding(tokenizer, tmp_path):
    model = adapted()
    report = save_merged(model, tokenizer, tmp_path / "m")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    for name, layer in lora_layers(model):
        assert torch.equal(loaded.get_submodule(name).weight, layer.merged_weight(torch.bfloat16))
    assert 1e-3 < report.relative_error < 2**-8 and 0 < report.kl < 1e-4


def test_a_quantized_folder_is_the_model_merged_in_place(tokenizer, tmp_path):
    from qlora_native.loading import load_model

    model = adapted()
    before = logits(model)
    report = save_merged(model, tokenizer, tmp_path / "m", dtype=None)
    assert torch.equal(logits(model), before)
    loaded, _ = load_model(tmp_path / "m")
    merge(model)
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)

    error = norm = change = base = 0.0
    for name, layer in lora_layers(model):
        merged, plain = layer.merged_weight(), layer.dequantize()
        stored = loaded.get_submodule(name)
        assert torch.equal(stored.weight, layer.merged_packed), name
        assert stored.quant_state == layer.merged_state, name
        error += (stored.dequantize(torch.float32) - merged).square().sum()
        norm += merged.square().sum()
        change += (merged - plain).square().sum()
        base += plain.square().sum()
    assert report.relative_error == pytest.approx(math.sqrt(error / norm), rel=1e-4)
    assert report.relative_change == pytest.approx(math.sqrt(change / base), rel=1e-4)
    assert 0.01 < report.relative_error <= report.worst_error < 0.15
    assert report.kl > 0 and report.worst in dict(lora_layers(model))
    for part in ("14 layers merged", report.worst, "nats a token"):
        assert part in str(report)


@pytest.mark.parametrize(
    ("rounding", "low", "high"), [("nearest", 0.0, 0.5), ("stochastic", 0.9, 1.1)]
)
def test_tells_how_much_of_a_small_change_is_kept(rounding, low, high, tokenizer, tmp_path):
    model = adapted()
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=1e-3)
    report = save_merged(
        model, tokenizer, tmp_path / "m", dtype=None, rounding=rounding, prompts=()
    )
    assert low <= report.kept < high


def test_kl_is_that_of_the_logits(tokenizer, tmp_path):
    model = adapted()
    report = save_merged(model, tokenizer, tmp_path / "m", dtype=None, prompts=["The capital of"])
    ids = tokenizer("The capital of", return_tensors="pt")["input_ids"]
    p = logits(model, ids)[0].double().log_softmax(-1)
    merge(model)
    q = logits(model, ids)[0].double().log_softmax(-1)
    want = nn.functional.kl_div(q, p, log_target=True, reduction="batchmean").item()
    assert report.kl == pytest.approx(want, rel=1e-3) and report.tokens == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, None], ids=str)
def test_without_prompts(dtype, tokenizer, tmp_path):
    report = save_merged(adapted(), tokenizer, tmp_path / "m", dtype=dtype, prompts=())
    assert report.tokens == 0 and math.isnan(report.kl) and report.relative_error > 0
    assert "KL" not in str(report)


def test_shards_and_tied_weights(tokenizer, tmp_path):
    model = adapted()
    save_merged(
        model, tokenizer, tmp_path / "m", dtype=torch.float32, max_shard_bytes=60_000, prompts=()
    )
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert "lm_head.weight" not in index["weight_map"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.allclose(logits(loaded), logits(model), atol=2e-5)


def test_gpt2s_weights_are_written_transposed_back(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=128, n_positions=32)
    model = adapted(transformers.GPT2LMHeadModel(config).eval())
    save_merged(model, tokenizer, tmp_path / "m", dtype=torch.float32)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.allclose(logits(loaded), logits(model), atol=2e-5)


def test_an_adapter_merges_as_the_one_it_was_loaded_from(tokenizer, tmp_path):
    model = adapted()
    save_adapter(model, tmp_path / "adapter")
    other = tiny_llama()
    quantize(other)
    load_adapter(other, tmp_path / "adapter")
    for folder, which in (("a", model), ("b", other)):
        save_merged(which, tokenizer, tmp_path / folder, prompts=())
    weights = [(tmp_path / f / "model.safetensors").read_bytes() for f in ("a", "b")]
    assert weights[0] == weights[1]


def test_what_the_dtype_cannot_hold_is_refused_and_nothing_is_left(tokenizer, tmp_path):
    model = adapted()
    name, layer = next(lora_layers(model))
    with torch.no_grad():
        layer.lora_B.fill_(1e5)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"{name}.weight: .*not finite in torch.float16.*choose"):
        save_merged(model, tokenizer, tmp_path / "m", dtype=torch.float16, prompts=())
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_refuses_to_replace_what_is_no_model(tokenizer, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is no model folder"):
        save_merged(adapted(), tokenizer, tmp_path)
    plain = tiny_llama()
    quantize(plain)
    with pytest.raises(ValueError, match="no adapters: there is nothing to merge"):
        save_merged(plain, tokenizer, tmp_path / "m")
