"""from_pretrained with our layers: quantized while loading, saved, loaded, from bitsandbytes."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qlora_native as qn
from qlora_native.experts import Experts4bit
from qlora_native.functional import quantize_4bit
from qlora_native.nn import Linear4bit
from tiny import make_llama

transformers = pytest.importorskip("transformers")
ours = pytest.importorskip("qlora_native.integrations.transformers")

IDS = torch.arange(1, 9)[None]
UNTIED = {"tie_word_embeddings": False}


def load(folder, config=None, **options):
    options |= {} if config is None else {"quantization_config": config}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.fixture
def folder(tmp_path):
    make_llama(**UNTIED).save_pretrained(tmp_path / "floats", max_shard_size="100KB")
    return tmp_path / "floats"


def layers_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, Linear4bit)}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


# ---- our config ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"format": "fp4", "double_quant": False, "blocksize": 32}, {"compute_dtype": "bfloat16"}],
    ids=str,
)
def test_quantizes_while_loading_and_round_trips(folder, tmp_path, options):
    model = load(folder, ours.QLoRANativeConfig(**options))
    floats = make_llama(**UNTIED)
    settings = {"format": "nf4", "double_quant": True, "blocksize": 64, **options}
    settings.pop("compute_dtype", None)
    assert len(layers_of(model)) == 14 and model.dtype == torch.float32
    for name, layer in layers_of(model).items():
        packed, state = quantize_4bit(floats.get_submodule(name).weight, **settings)
        assert torch.equal(layer.weight, packed) and layer.quant_state == state, name
    assert not any(parameter.is_meta for parameter in model.parameters())
    model.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    again = load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    q_proj = again.model.layers[0].self_attn.q_proj
    assert q_proj.compute_dtype == (torch.bfloat16 if "compute_dtype" in options else None)
    assert again.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()


def test_one_float_weight_is_in_memory_at_a_time(folder, monkeypatch):
    seen = []
    real = ours.QLoRANativeQuantizer.quantize

    def quantize(self, weight, name):
        assert [ref for ref in seen if ref() is not None] == []
        seen.append(weakref.ref(weight))
        return real(self, weight, name)

    monkeypatch.setattr(ours.QLoRANativeQuantizer, "quantize", quantize)
    load(folder, ours.QLoRANativeConfig(), dtype=torch.bfloat16)
    assert len(seen) == 14


def test_dtype_skipped_modules_and_the_report(folder):
    config = ours.QLoRANativeConfig(skip_modules=["lm_head", "down_proj"])
    model = load(folder, config, dtype=torch.bfloat16)
    assert len(layers_of(model)) == 12 and type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert model.model.layers[0].mlp.up_proj.weight_dtype == torch.bfloat16
    report = model.hf_quantizer.report
    assert len(report.quantized) == 12
    assert report.left["model.layers.1.mlp.down_proj"] == ("in skip_modules", 2 * 128 * 64)
    assert "model.layers.*.mlp.down_proj (2 of them): in skip_modules; 0.0 MiB" in str(report)
    assert not report.unexpected()


def test_layers_that_cannot_be_quantized_are_told(tmp_path, caplog):
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2, pad_token_id=0,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        model = load(tmp_path, ours.QLoRANativeConfig(blocksize=4096))
    (record,) = [r for r in caplog.records if r.name.startswith("qlora_native")]
    text = record.getMessage()
    assert "4 layers of MixtralForCausalLM are quantized; these are not" in text
    assert "model.layers.*.mlp.experts: down_proj: its matrices have 2048 values" in text
    left = model.hf_quantizer.report.unexpected()
    assert left["model.layers.0.mlp.experts"].nbytes == 4 * 2 * 3 * 64 * 32
    qn.quantize(model)
    assert type(model.model.layers[0].mlp.experts) is Experts4bit
    assert torch.isfinite(logits(model)).all()


def test_a_conv1d_model(tmp_path):
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=0
    )
    floats = transformers.GPT2LMHeadModel(config)
    floats.save_pretrained(tmp_path / "floats")
    model = load(tmp_path / "floats", ours.QLoRANativeConfig())
    layer = model.transformer.h[0].attn.c_attn
    want = quantize_4bit(floats.transformer.h[0].attn.c_attn.weight.T.contiguous())
    assert (layer.out_features, layer.in_features) == (96, 32)
    assert torch.equal(layer.weight, want[0])
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_dequantize_gives_an_ordinary_model(folder, tmp_path):
    model = load(folder, ours.QLoRANativeConfig())
    want = logits(model)
    floats = model.dequantize()
    assert not layers_of(floats) and torch.allclose(logits(floats), want, atol=1e-5)
    floats.save_pretrained(tmp_path / "floats again")
    assert "quantization_config" not in json.loads(
        (tmp_path / "floats again" / "config.json").read_text()
    )


# ---- bitsandbytes' folders -----------------------------------------------------------------------


def bnb_config(**options):
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **options}
    return transformers.BitsAndBytesConfig(load_in_4bit=True, **options)


@pytest.fixture
def handled():
    ours.handle_bitsandbytes()
    yield
    ours.handle_bitsandbytes(False)


BNB = {
    "nf4 double": {},
    "fp4": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
    "stored as bfloat16": {"bnb_4bit_quant_storage": "bfloat16"},
}


@pytest.mark.parametrize("case", BNB)
def test_a_folder_of_bitsandbytes_is_used_as_it_is_and_saved_byte_for_byte(case, folder, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    theirs = load(folder, bnb_config(**BNB[case]))
    theirs.save_pretrained(tmp_path / "theirs")
    model = load(tmp_path / "theirs", ours.QLoRANativeConfig())
    for name, layer in layers_of(model).items():
        weight = theirs.get_submodule(name).weight
        want = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(layer.dequantize(), want), name
    model.save_pretrained(tmp_path / "ours")
    for file in ("model.safetensors", "config.json"):
        assert same_bytes(tmp_path / "theirs" / file, tmp_path / "ours" / file), file


def same_bytes(a, b):
    return a.read_bytes() == b.read_bytes()


def test_bitsandbytes_config_with_our_layers(folder, tmp_path, handled):
    model = load(folder, bnb_config())
    assert len(layers_of(model)) == 14
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
    packed = model.model.layers[0].mlp.up_proj.weight.clone()
    model.to(torch.bfloat16).to("cpu").to(torch.float32)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, packed)
    model = load(folder, bnb_config())
    model.save_pretrained(tmp_path / "ours")
    again = load(tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))
    ours.handle_bitsandbytes(False)
    bnb = pytest.importorskip("bitsandbytes")
    theirs = load(tmp_path / "ours")
    for name, layer in layers_of(model).items():
        weight = theirs.get_submodule(name).weight
        assert torch.equal(
            bnb.functional.dequantize_4bit(weight.data, weight.quant_state), layer.dequantize()
        )
    fresh = load(folder, bnb_config())
    fresh.save_pretrained(tmp_path / "theirs")
    assert same_bytes(*(tmp_path / name / "model.safetensors" for name in ("theirs", "ours")))


def test_what_older_versions_wrote_is_kept(folder, tmp_path, handled):
    load(folder, bnb_config()).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(path)
    key = "model.layers.0.self_attn.q_proj.weight.nested_quant_map"
    tensors[key][3] = torch.nextafter(tensors[key][3], torch.tensor(2.0))
    save_file(tensors, path, metadata={"format": "pt"})
    model = load(tmp_path / "saved")
    model = pickle.loads(pickle.dumps(model))
    model.save_pretrained(tmp_path / "again")
    assert same_bytes(path, tmp_path / "again" / "model.safetensors")
    layer = model.model.layers[0].self_attn.q_proj
    layer.quantize_weight(layer.dequantize())
    assert layer.stored is None


# ---- with peft, cast, copied ---------------------------------------------------------------------


def test_kbit_preparation_and_training_steps(folder):
    peft = pytest.importorskip("peft")
    model = load(folder, ours.QLoRANativeConfig(), dtype=torch.bfloat16)
    before = copy.deepcopy(layers_of(model)["model.layers.0.mlp.up_proj"].quant_state)
    model = peft.prepare_model_for_kbit_training(model)
    assert model.is_gradient_checkpointing
    assert all(p.dtype == torch.float32 for p in model.parameters())  # the trap that docs tell of
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == "LoraLinear4bit"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model.train()(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert layer.base_layer.quant_state == before


def test_casts_never_touch_the_packed_weights(folder):
    model = load(folder, ours.QLoRANativeConfig())
    layer = layers_of(model)["model.layers.0.mlp.up_proj"]
    before = layer.weight.clone(), copy.deepcopy(layer.quant_state)
    model.to(torch.bfloat16)
    model.to("cpu", torch.float16)
    for cast in (model.half, model.float):
        with pytest.raises(ValueError, match="is not supported for quantized model"):
            cast()
    nn.Module.float(model)
    nn.Module.half(model)
    model.bfloat16()
    assert torch.equal(layer.weight, before[0]) and layer.quant_state == before[1]
    assert logits(model).dtype == torch.bfloat16


def test_adapters_of_our_own_on_a_loaded_model(folder):
    model = load(folder, ours.QLoRANativeConfig())
    want = logits(model)
    names = qn.add_lora(model, r=2)
    assert len(names) == 14 and torch.allclose(logits(model), want, atol=1e-5)


def test_copies_of_a_model(folder):
    model = load(folder, ours.QLoRANativeConfig(compute_dtype="bfloat16"))
    want = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        assert torch.equal(logits(other), want)


# ---- bad input -----------------------------------------------------------------------------------


def test_missing_weights_are_named(folder, tmp_path):
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    dropped = "model.layers.0.self_attn.q_proj.weight"
    path = folder / value["weight_map"].pop(dropped)
    index.write_text(json.dumps(value))
    tensors = load_file(path)
    del tensors[dropped]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks {dropped}, of layers to be quantized"):
        load(folder, ours.QLoRANativeConfig())


def test_half_a_packed_weight_is_named(folder, tmp_path, caplog):
    load(folder, ours.QLoRANativeConfig()).save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.self_attn.q_proj.weight.absmax"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="For details look at the"):
        load(tmp_path / "saved")
    assert "key weight.absmax is missing beside weight.quant_state" in caplog.text
    assert "model.layers.0.self_attn.q_proj.weight" in caplog.text


def test_non_finite_weights_are_named(folder, caplog):
    model = make_llama(**UNTIED)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(RuntimeError, match="For details look at the"):
        load(folder, ours.QLoRANativeConfig())
    assert "model.layers.0.mlp.up_proj.weight" in caplog.text


def test_what_is_left_on_the_meta_device_is_named():
    with torch.device("meta"):
        model = make_llama()
    quantizer = ours.QLoRANativeQuantizer(ours.QLoRANativeConfig())
    with pytest.raises(ValueError, match=r"model.embed_tokens.weight, .* and \d+ more were left"):
        quantizer._require_all(model, {}, {})


BAD_CONFIGS = {
    "format": ({"format": "int4"}, "format must be one of .*'int4'"),
    "blocksize": ({"blocksize": 100}, "blocksize must be one of .*got 100"),
    "compute_dtype": ({"compute_dtype": "int8"}, "compute_dtype must be None or one of .*'int8'"),
    "skip_modules": ({"skip_modules": [1]}, r"skip_modules must be a list of names, got \[1\]"),
    "double_quant": ({"double_quant": 1}, "double_quant must be a bool, got 1"),
    "scale_rounding": ({"scale_rounding": "up"}, "scale_rounding must be one of .*'up'"),
    "method": ({"quant_method": "gptq"}, "quant_method must be 'qlora_native', got 'gptq'"),
    "unknown": ({"bits": 4}, "QLoRANativeConfig has no 'bits': it has format"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_config_refuses(case):
    options, message = BAD_CONFIGS[case]
    with pytest.raises((ValueError, TypeError), match=message):
        ours.QLoRANativeConfig(**options)


def test_a_folder_quantized_by_others_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantized by gptq, and quantizing it again compounds"):
        load(folder, ours.QLoRANativeConfig())


def test_offloading_is_refused(folder):
    with pytest.raises(ValueError, match="device_map puts a part of the model on the disk"):
        load(folder, ours.QLoRANativeConfig(), device_map={"model": "cpu", "lm_head": "disk"})
